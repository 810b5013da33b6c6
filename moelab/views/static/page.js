// The exported page: unpacks the recording inside it and puts it on the stage. No kernel, no network.

import { DARK } from "./colours.js";
import { h, markup, say } from "./element.js";
import { Recording, unpack } from "./recording.js";
import { FileSource } from "./source.js";
import { headOf, rootOf, modelShape, Stage } from "./stage.js";

async function unzip(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const HOW =
  "Every event of this run is in this file: click a token to see what it waited for, " +
  "drag the time axis, click an expert.";

/** Put a recording on the page in this element. */
function showPage(node, recording) {
  const { model, settings, columns } = recording.document,
    root = rootOf(`Recorded run of ${model.name}`);
  node.replaceChildren(root);
  const stage = new Stage(root, { ...model, columns }, {
    source: new FileSource(recording),
    why: null,
    shade: (mode) => stage.text.setMode(mode),
    canLive: false,
  });
  const name = model.name.split(/[\\/]/).at(-1),
    code = settings.map((s) => `# from token ${s.token}\n${s.code}`).join("\n\n");
  root.prepend(
    headOf(h("span", { class: "moe-soft" }, `${name} · ${modelShape(model)}`), stage.status),
    h("p", { class: "moe-lead" }, ...lead(recording.document)),
    stage.figures.node, stage.timeline.node, stage.main,
    markup`
      <details class="moe-code">
        <summary>The settings as code</summary>
        ${h("pre", { tabindex: 0 }, code)}
      </details>`,
  );
  DARK.addEventListener("change", () => stage.repaint());
  stage.text.setMode("cost");
  stage.map.relabel();
  stage.bars.relabel();
  if (recording.count) stage.goCostliest();
  else say(stage.state, "no token was recorded");
}

/** What this is, and where to begin. */
function lead({ settings, error }) {
  const times = settings.length - 1,
    many = times ? `, changed ${times === 1 ? "once" : `${times} times`} on the way` : "";
  return [
    h("b", {}, settings[0]?.short ?? "a recorded run"),
    `${many}. ${HOW}`,
    error ? h("b", { class: "moe-bad" }, ` The run ended with an error: ${error}`) : "",
  ];
}

async function openPage() {
  const node = document.getElementById("moelab-page"),
    note = document.getElementById("moelab-note");
  if (!("DecompressionStream" in globalThis) || !Array.prototype.findLast) return; // the note says it
  say(note, "Opening the recording …");
  try {
    const packed = unpack(document.getElementById("moelab-recording").textContent.trim());
    showPage(node, new Recording(await unzip(packed)));
  } catch (error) {
    say(note, `This recording cannot be drawn: ${error.message}`);
    throw error;
  }
}

if (globalThis.document) openPage();
