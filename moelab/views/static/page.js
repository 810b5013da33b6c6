// The exported page: unpacks the recording inside it and puts it on the stage. No kernel, no network.

async function unzip(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

class Page {
  constructor(node, document_) {
    const recording = new Recording(document_),
      { model, settings } = recording.document;
    this.root = h("div", {
      class: "moe-dash",
      role: "region",
      "aria-label": `Recorded run of ${model.name}`,
    });
    node.replaceChildren(this.root);
    this.stage = new Stage(this.root, model, {
      source: new FileSource(recording),
      why: null,
      shade: (mode) => this.stage.setMode(mode),
      canLive: false,
    });
    const { stage } = this,
      name = model.name.split(/[\\/]/).at(-1),
      shape = `${name} · ${model.architecture} · ${model.layers} layers × ${model.experts} experts, top ${model.top_k}`;
    this.root.prepend(
      h(
        "header",
        { class: "moe-head" },
        h("h2", {}, "moelab"),
        h("span", { class: "moe-soft" }, shape),
        stage.status,
      ),
      h("p", { class: "moe-lead" }, ...this.lead(recording)),
      stage.figures.node,
      stage.timeline.node,
      stage.main,
      this.code(settings),
    );
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.scheme.addEventListener("change", () => stage.repaint());
    stage.setMode("cost");
    stage.map.relabel();
    stage.bars.relabel();
    if (recording.count) stage.goCostliest();
    else say(stage.state, "no token was recorded");
  }

  /** What this is, and where to begin. */
  lead(recording) {
    const { settings, error } = recording.document,
      times = settings.length - 1,
      many = times ? `, changed ${times === 1 ? "once" : `${times} times`} on the way` : "";
    return [
      h("b", {}, settings[0]?.short ?? "a recorded run"),
      `${many}. Every event of this run is in this file: click a token to see what it waited for, drag the time axis, click an expert.`,
      error ? h("b", { class: "moe-bad" }, ` The run ended with an error: ${error}`) : "",
    ];
  }

  code(settings) {
    const lines = settings.map(({ token, code }) => `# from token ${token}\n${code}`).join("\n\n");
    return h(
      "details",
      { class: "moe-code" },
      h("summary", {}, "The settings as code"),
      h("pre", { tabindex: 0 }, lines),
    );
  }
}

async function openPage() {
  const node = document.getElementById("moelab-page"),
    note = document.getElementById("moelab-note");
  if (!("DecompressionStream" in globalThis) || !Array.prototype.findLast) return; // the note says it
  say(note, "Opening the recording …");
  try {
    const packed = unpack(document.getElementById("moelab-recording").textContent.trim());
    new Page(node, await unzip(packed));
  } catch (error) {
    say(note, `This recording cannot be drawn: ${error.message}`);
    throw error;
  }
}

openPage();
