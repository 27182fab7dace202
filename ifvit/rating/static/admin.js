"use strict";

const EVERY_MS = 5000;

async function update() {
  if (document.hidden) return;
  const live = document.getElementById("live");
  try {
    const reply = await fetch(location.pathname);
    if (!reply.ok) throw new Error(`server status ${reply.status}`);
    const page = new DOMParser().parseFromString(await reply.text(), "text/html");
    const shown = document.getElementById("results");
    const isOpen = shown.querySelector("details")?.open;
    shown.replaceWith(page.getElementById("results"));
    if (isOpen) document.querySelector("#results details").open = true;
    live.textContent = `As of ${new Date().toLocaleTimeString()}. This page updates every few seconds.`;
  } catch (error) {
    live.textContent = `Not updated: ${error.message}.`;
  }
}
setInterval(update, EVERY_MS);
