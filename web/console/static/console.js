// What the console's pages do beyond links and forms; each works without it, too.
"use strict";
(() => {
  const root = document.documentElement;
  const THEME = "portal-theme";

  // Light or dark: as the system says until the reader chooses. Set before the page is painted.
  const stored = (() => { try { return localStorage.getItem(THEME); } catch { return null; } })();
  if (stored === "light" || stored === "dark") root.dataset.theme = stored;
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const switchTheme = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem(THEME, root.dataset.theme); } catch { /* for this page alone, then */ }
  };

  // Times: written in the reader's zone; the title has UTC.
  const full = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const localize = (within) => {
    for (const time of within.querySelectorAll("time[datetime]:not([data-done])")) {
      const at = new Date(time.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      time.dataset.done = "";
      if ("relative" in time.dataset) time.title = `${full.format(at)} (${time.title})`;
      else time.textContent = full.format(at);
    }
  };

  const copy = async (element) => {
    try { await navigator.clipboard.writeText(element.dataset.copy); } catch { return; }
    element.dataset.copied = "";
    const label = element.querySelector("span");
    if (label) label.textContent = "Copied";
    setTimeout(() => { delete element.dataset.copied; if (label) label.textContent = "Copy"; }, 1500);
  };

  // Browsers without the attribute `command`.
  const commands = { "show-modal": (dialog) => dialog.showModal(), close: (dialog) => dialog.close() };
  const runCommand = (button) => {
    if ("commandForElement" in HTMLButtonElement.prototype) return;
    const dialog = document.getElementById(button.getAttribute("commandfor"));
    if (dialog) commands[button.getAttribute("command")]?.(dialog);
  };

  document.addEventListener("click", (event) => {
    const target = event.target instanceof Element ? event.target : null;
    if (!target) return;
    if (target.closest("[data-theme-switch]")) switchTheme();
    const code = target.closest("[data-copy]");
    if (code) copy(code);
    const button = target.closest("button[command]");
    if (button) runCommand(button);
    for (const menu of document.querySelectorAll("details.account[open]")) {
      if (!menu.contains(target)) menu.open = false;
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      for (const menu of document.querySelectorAll("details.account[open]")) {
        menu.open = false;
        menu.querySelector("summary").focus();
      }
    }
    const typing = event.target instanceof Element && event.target.closest("input, textarea, select");
    if (event.key === "/" && !typing) {
      const search = document.querySelector("input[type=search]");
      if (search) { event.preventDefault(); search.focus(); }
    }
  });
  // A form is sent once, however often its button is pressed.
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (!(form instanceof HTMLFormElement) || form.method !== "post" || event.defaultPrevented) return;
    if ("sent" in form.dataset) { event.preventDefault(); return; }
    form.dataset.sent = "";
    setTimeout(() => delete form.dataset.sent, 5000);
  });
  // A list with check boxes: one for all, and how many are ticked.
  document.addEventListener("change", (event) => {
    const box = event.target;
    const form = box instanceof HTMLInputElement && box.type === "checkbox" ? box.closest("[data-bulk]") : null;
    if (!form) return;
    const boxes = [...form.querySelectorAll("input[name=ids]")];
    if ("checkAll" in box.dataset) for (const one of boxes) one.checked = box.checked;
    const ticked = boxes.filter((one) => one.checked).length;
    const all = form.querySelector("[data-check-all]");
    if (all) { all.checked = ticked === boxes.length; all.indeterminate = ticked > 0 && ticked < boxes.length; }
    form.querySelector("[data-bulk-count]").textContent = ticked ? `${ticked} selected` : "";
  });
  document.addEventListener("DOMContentLoaded", () => {
    root.dataset.script = "";
    localize(document);
  });
  // What is left empty in a form of filters stays out of the address.
  document.addEventListener("htmx:config:request", (event) => {
    const { request } = event.detail.ctx;
    if (request.method !== "GET" || !(request.body instanceof FormData)) return;
    for (const name of [...new Set(request.body.keys())]) {
      if (request.body.getAll(name).every((value) => value === "")) request.body.delete(name);
    }
  });
  document.addEventListener("htmx:after:swap", () => localize(document));
})();
