// Keys: Enter sends, Escape stops an answer, "/" goes to the box for questions. While an answer is being written or the
// conversation is being cleared, nothing is sent and what is typed stays: Gradio itself would send it, and lose it.
() => {
  const box = (part) => document.querySelector(`#box ${part}`);
  const isBusy = () => document.body.classList.contains("clearing") || !box(".submit-button");
  const drop = (event) => {
    event.preventDefault();
    event.stopPropagation();
  };
  document.addEventListener("keydown", (event) => {
    const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    // Whoever composes a character, as in Japanese, uses Escape for that.
    if (event.key === "Escape" && !event.isComposing && !event.defaultPrevented) {
      box(".stop-button")?.click();
    } else if (event.key === "/" && !isTyping) {
      box("textarea")?.focus();
      event.preventDefault();
    }
  });
  // Before Gradio's own listeners.
  document.addEventListener("keypress", (event) => {
    if (event.key === "Enter" && !event.shiftKey && event.target === box("textarea") && isBusy()) drop(event);
  }, true);
  document.addEventListener("click", (event) => {
    // The button that clears: Gradio translates its name.
    if (event.target.closest("#talk > .wrapper > .top-panel button")) {
      document.body.classList.add("clearing");
    } else if (event.target.closest("#box .submit-button, #talk .example") && isBusy()) {
      drop(event);
    }
  }, true);
};
