"use strict";

const MAX_COARSE_PX = 128;
const by = (id) => document.getElementById(id);
const form = by("question");
const next = by("next");
const dialog = by("reasons");
const ordinal = (n) => ["best", "second best", "third best", "fourth best", "fifth best"][n];

for (const image of document.images) {
  const sharpen = () => image.classList.toggle("coarse", image.naturalWidth <= MAX_COARSE_PX);
  image.complete ? sharpen() : image.addEventListener("load", sharpen);
}

/* Ranking: `order` lists places on the page from best to worst. */
function ranking() {
  const field = by("ranking");
  const choices = [...document.querySelectorAll(".choice")];
  let order = field.value ? field.value.split(",").map(Number) : [];

  function show() {
    choices.forEach((choice, place) => {
      const rank = order.indexOf(place) + 1;
      choice.classList.toggle("ranked", rank > 0);
      choice.querySelector(".rank").textContent = rank || "";
      choice.setAttribute("aria-label", `Image ${place + 1}, ${rank ? `rank ${rank}` : "not ranked"}`);
    });
    field.value = order.join(",");
    next.disabled = order.length < choices.length;
    by("clear").disabled = order.length === 0;
    by("hint").textContent =
      (next.disabled ? `Choose the ${ordinal(order.length)} image.` : "All are ranked.") +
      (order.length ? " Choose a ranked one again to take it back." : "");
  }

  function toggle(place) {
    if (order.includes(place)) {
      order = order.filter((other) => other !== place);
    } else {
      order.push(place);
      const rest = choices.map((_, other) => other).filter((other) => !order.includes(other));
      if (rest.length === 1) order.push(rest[0]);
    }
    show();
  }

  function clear() {
    order = [];
    show();
  }

  choices.forEach((choice, place) => choice.addEventListener("click", () => toggle(place)));
  by("clear").addEventListener("click", clear);
  show();

  return (key) => {
    const focused = choices.indexOf(document.activeElement);
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[key];
    if (key >= "1" && key <= String(choices.length)) toggle(Number(key) - 1);
    else if (key === "r") clear();
    else if (step) choices.at((focused + (focused < 0 && step < 0 ? 0 : step)) % choices.length).focus();
    else if (key === "Enter" && focused >= 0 && !next.disabled) form.requestSubmit(next);
    else return false;
    return true;
  };
}

/* Counting: the field takes any number; the buttons are for touch screens. */
function counting() {
  const field = by("count");
  const digits = [...document.querySelectorAll(".digit")];

  function show() {
    next.disabled = !field.validity.valid;
    for (const digit of digits) {
      digit.setAttribute("aria-pressed", String(digit.dataset.number === field.value));
    }
  }

  for (const digit of digits) {
    digit.addEventListener("click", () => {
      field.value = digit.dataset.number;
      show();
    });
  }
  field.addEventListener("input", show);
  by("hint").textContent = `Larger numbers go into the field, up to ${field.max}.`;
  // On a touch screen, focus would open the keyboard over the image.
  if (matchMedia("(hover: hover)").matches) {
    field.focus();
    field.select();
  }
  show();

  return (key) => {
    if (key === "c") by("unclear").click();
    else if (key >= "0" && key <= "9" && document.activeElement !== field) {
      field.focus();
      field.select();
      return false; // the browser types the digit into the field
    } else return false;
    return true;
  };
}

const handle = by("ranking") ? ranking() : counting();

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  let used = true;
  if (dialog.open) {
    const reason = /^[1-9]$/.test(key) && dialog.querySelectorAll("[name=skip_reason]")[key - 1];
    if (reason) reason.click();
    used = Boolean(reason);
  } else if (key === "s") dialog.showModal();
  else if (key === "b") by("back")?.click();
  else if (key === "Enter" && document.activeElement === document.body && !next.disabled) form.requestSubmit(next);
  else used = handle(key);
  if (used) event.preventDefault();
});

by("skip").addEventListener("click", () => dialog.showModal());
by("cancel").addEventListener("click", () => dialog.close());

/* The script sends the form, so that a lost connection loses neither the page nor the answer. */
let sending = false;
async function send(event) {
  event.preventDefault();
  if (sending) return;
  sending = true;
  const button = event.submitter;
  const fields = button?.name ? { [button.name]: button.value } : new FormData(event.target);
  try {
    const reply = await fetch(location.pathname, { method: "POST", body: new URLSearchParams(fields) });
    if (!reply.ok) throw new Error(`server status ${reply.status}`);
    location.assign(reply.url);
  } catch (error) {
    sending = false;
    dialog.close();
    by("unsaved").textContent = `Not saved (${error.message}). Please try again.`;
    by("unsaved").hidden = false;
  }
}
for (const each of document.forms) each.addEventListener("submit", send);
