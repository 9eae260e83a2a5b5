// Ask for the part that changes, and show it when it has; say so when nobody answers.
const EVERY = 2000;
const place = document.getElementById("now"), fresh = document.getElementById("fresh");
let tag = "";
const look = async () => {
  try {
    const answer = await fetch("/now", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store", signal: AbortSignal.timeout(20000) });
    if (answer.status === 200) {
      place.innerHTML = await answer.text();
      tag = answer.headers.get("ETag") || "";
    } else if (answer.status !== 304) throw new Error(answer.status);
    document.body.classList.remove("stale");
    fresh.textContent = "This page renews itself.";
  } catch {
    document.body.classList.add("stale");
    fresh.textContent = "Nobody answers any more: this is how it was.";
  }
  setTimeout(look, document.hidden ? 5 * EVERY : EVERY);
};
setTimeout(look, EVERY);
