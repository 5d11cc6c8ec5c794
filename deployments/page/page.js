// Keys: Escape stops an answer, "/" goes to the box for questions.
() => {
  document.addEventListener("keydown", (event) => {
    const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
    if (event.key === "Escape") {
      document.querySelector("#box .stop-button")?.click();
    } else if (event.key === "/" && !isTyping) {
      document.querySelector("#box textarea")?.focus();
      event.preventDefault();
    }
  });
};
