// Two runs beside each other: the first different token marked, and every figure's difference.

import { cross, h, markup, say } from "./element.js";
import { signed, titleOf, written } from "./numbers.js";

export class Beside {
  constructor(close) {
    this.head = h("span");
    this.texts = h("div", { class: "moe-texts" });
    this.scroll = h("div", { class: "moe-scroll" });
    this.node = markup`
      <section class="moe-beside" aria-label="Two runs beside each other" hidden>
        <header><h3>Beside each other</h3>${[this.head, cross("Close the comparison", close)]}</header>
        <div class="moe-pair">${[this.texts, this.scroll]}</div>
      </section>`;
  }

  show(two, saved) {
    const { names, at, prompts, verdict } = two;
    const numbers = names.map((name) => saved.find((run) => run.name === name)?.number ?? ""),
      parting = at === null ? "every token is the same" : `first different token: ${at}`,
      differ = prompts[0] !== prompts[1] ? "different prompts" : parting;
    say(this.head, `${differ} · ${verdict}`);
    this.texts.replaceChildren(...names.map((_, i) => text(two, numbers[i], i)));
    for (const mark of this.texts.querySelectorAll("mark"))
      mark.parentElement.scrollTop = Math.max(0, mark.offsetTop - 90);
    const column = (name, i) =>
      markup`<th scope="col" title="${name}"><b class="moe-number">${numbers[i]}</b></th>`;
    this.scroll.replaceChildren(markup`
      <table class="moe-table">
        <caption class="moe-voice">Figures of ${names.join(" and ")}</caption>
        <thead><tr><th scope="col"></th>${names.map(column)}<th scope="col">difference</th></tr></thead>
        <tbody>${two.figures.map((row) => figure(...row))}</tbody>
      </table>`);
    this.node.hidden = false;
    this.node.dataset.at = at ?? "";
    this.node.dataset.names = names.join("|");
  }
}

function text({ names, at, pieces, prompts, settings }, number, i) {
  const all = pieces[i],
    cut = at ?? all.length,
    there = all.slice(cut, cut + 1).join("") || "∎";
  const parts = [h("span", { class: "moe-prompt" }, prompts[i]), all.slice(0, cut).join("")];
  if (at !== null) {
    parts.push(h("mark", { title: `token ${at}: the first that differs` }, there));
    parts.push(h("span", { class: "moe-since" }, all.slice(cut + 1).join("")));
  }
  return markup`
    <figure>
      <figcaption>
        <b class="moe-number">${number}</b>${names[i]}<small>${settings[i]}</small>
      </figcaption>
      <div class="moe-text" tabindex="0" role="group" aria-label="Text of ${names[i]}">${parts}</div>
    </figure>`;
}

function figure(key, a, b, difference) {
  return markup`
    <tr>
      <th scope="row">${titleOf(key).replaceAll("_", " ")}</th>
      <td data-key="${key}">${written(key, a)}</td>
      <td data-key="${key}">${written(key, b)}</td>
      <td data-key="${key}">${signed(key, difference)}</td>
    </tr>`;
}
