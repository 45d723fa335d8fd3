// Follows what changes: loads the content of a page again when the canary's status changes, or a room of a batch does. A page is complete without it.
"use strict";
const main = document.querySelector("main[data-live]");
let stream;
// One load at a time, so that a slow one can't show an older state than the one after it.
let isWaiting = false;
let isStale = false;

// What a reader could have focused or opened is found again by what it says.
const nameOf = (element) => element && `${element.tagName} ${element.getAttribute("href") ?? element.textContent}`;

function show(shown, loaded) {
  if (shown.innerHTML === loaded.innerHTML) return;
  const focused = shown.contains(document.activeElement) && nameOf(document.activeElement);
  const opened = [...shown.querySelectorAll("details[open] > summary")].map(nameOf);
  shown.className = loaded.className;
  shown.replaceChildren(...loaded.childNodes);
  for (const summary of shown.querySelectorAll("summary")) {
    if (opened.includes(nameOf(summary))) summary.parentElement.open = true;
  }
  if (!focused) return;
  const again = [...shown.querySelectorAll("a, button, summary")].find((element) => nameOf(element) === focused);
  again?.focus({ preventScroll: true });
}

// Returns whether the page is up to date.
async function load() {
  // Nothing moves while a recording plays. A page that can't be seen is loaded when it can: each stream begins with the status.
  if ([...document.querySelectorAll("audio")].some((audio) => !audio.paused)) return false;
  if (document.hidden) return true;
  const response = await fetch(location.href, { cache: "no-store" });
  // A batch that has just ended is in the history a moment later.
  if (!response.ok) return false;
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  document.title = page.title;
  for (const part of ["h1", "main"]) show(document.querySelector(part), page.querySelector(part));
  const icon = page.querySelector("link[rel=icon]").getAttribute("href");
  document.querySelector("link[rel=icon]").setAttribute("href", icon);
  // What has ended changes no more.
  if (!page.querySelector("main[data-live]")) {
    document.removeEventListener("visibilitychange", listen);
    stream.close();
  }
  return true;
}

function follow() {
  isStale = true;
  if (isWaiting) return;
  isWaiting = true;
  setTimeout(async () => {
    isStale = false;
    const isCurrent = await load().catch(() => false);
    isWaiting = false;
    if (isStale || !isCurrent) follow();
  }, 1000);
}

// A browser opens few connections to one host, so a page that can't be seen leaves its own to the others.
function listen() {
  stream?.close();
  if (document.hidden) return;
  stream = new EventSource(main.dataset.live);
  for (const event of ["status", "batch"]) stream.addEventListener(event, follow);
}

if (main) {
  listen();
  document.addEventListener("visibilitychange", listen);
}
