// A switch for all code of the page, remembered
addEventListener("DOMContentLoaded", () => {
  const line = document.querySelector("p.where"), sources = document.querySelectorAll("details.source");
  if (!line || !sources.length) return;
  const button = document.createElement("button");
  const show = (open) => {
    sources.forEach((s) => (s.open = open));
    button.textContent = open ? "fold all code" : "show all code";
    button.onclick = () => { localStorage.setItem("dlm-code", open ? "folded" : "shown"); show(!open); };
  };
  line.append(" · ", button);
  show(localStorage.getItem("dlm-code") === "shown");
});
