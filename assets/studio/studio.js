// What the page does by itself, without asking the server: put an @name into the prompt, mark which names it mentions,
// tell when a clip is done, and keep still for those who asked their system for less motion.
(() => {
  const prompt = () => document.querySelector("#prompt textarea");
  const mentioned = (text) => new Set([...text.matchAll(/@([A-Za-z][A-Za-z0-9_]*)/g)].map((m) => m[1].toLowerCase()));

  function insertMention(name) {
    const box = prompt();
    if (!box) return;
    const start = box.selectionStart ?? box.value.length;
    const before = box.value.slice(0, start);
    const after = box.value.slice(box.selectionEnd ?? start);
    const lead = before && !/\s$/.test(before) ? " " : "";
    const trail = /^\s|^[.,;:!?]/.test(after) ? "" : " ";
    box.setRangeText(`${lead}@${name}${trail}`, start, box.selectionEnd ?? start, "end");
    box.dispatchEvent(new Event("input", { bubbles: true }));
    box.focus();
  }

  function markMentions() {
    const box = prompt();
    if (!box) return;
    const names = mentioned(box.value);
    document.querySelectorAll("[data-mention]").forEach((chip) => {
      const there = names.has(chip.dataset.mention);
      if (chip.classList.contains("there") === there) return;
      chip.classList.toggle("there", there);
      chip.setAttribute("aria-label", `Insert @${chip.dataset.mention} into the prompt${there ? "" : " (not mentioned yet)"}`);
    });
  }

  function stillIfAsked() {
    if (!window.matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    document.querySelectorAll("video[autoplay]").forEach((video) => {
      video.removeAttribute("autoplay");
      video.pause();
    });
  }

  // One notice per finished job, and none for those that were finished before the page opened.
  let told = null;
  function tell(element) {
    const state = element.querySelector("[data-finished]");
    if (!state) return;
    document.title = state.dataset.title;
    const finished = Number(state.dataset.finished);
    if (told !== null && finished > told && "Notification" in window && Notification.permission === "granted") {
      new Notification(state.dataset.headline, { body: state.dataset.body, icon: "/pwa_icon/192", silent: true });
    }
    told = told === null ? finished : Math.max(told, finished);
    const bell = element.querySelector("[data-bell]");
    if (bell) bell.hidden = !("Notification" in window) || Notification.permission !== "default";
  }

  window.studio = { tell };
  document.addEventListener("click", (event) => {
    const chip = event.target.closest?.("[data-mention]");
    if (chip) insertMention(chip.dataset.mention);
    const bell = event.target.closest?.("[data-bell]");
    if (bell) Notification.requestPermission().then(() => (bell.hidden = true));
  });
  document.addEventListener("input", markMentions);
  new MutationObserver(() => {
    markMentions();
    stillIfAsked();
  }).observe(document.documentElement, { childList: true, subtree: true });
  // The server writes into the prompt without an input event: look again now and then, it costs microseconds.
  setInterval(markMentions, 500);
})();
