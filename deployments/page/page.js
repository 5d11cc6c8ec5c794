// Keys: Enter sends, Escape stops an answer, "/" goes to the box for questions. While an answer is being written or the
// conversation is being cleared, nothing is sent and what is typed stays: Gradio itself would send it, and lose it.
() => {
  const box = (part) => document.querySelector(`#box ${part}`);
  const isBusy = () => document.body.classList.contains("clearing") || !box(".submit-button");
  document.addEventListener("keydown", (event) => {
    const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    if (event.key === "Enter" && !event.shiftKey && event.target === box("textarea") && isBusy()) {
      event.preventDefault();
      event.stopPropagation();
    } else if (event.key === "Escape") {
      box(".stop-button")?.click();
    } else if (event.key === "/" && !isTyping) {
      box("textarea")?.focus();
      event.preventDefault();
    }
  }, true);
  document.addEventListener("click", (event) => {
    if (event.target.closest('#talk button[aria-label="Clear"]')) {
      document.body.classList.add("clearing");
    } else if (event.target.closest("#box .submit-button") && isBusy()) {
      event.stopPropagation();
    }
  }, true);
};
