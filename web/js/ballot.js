// The voting panel: shows one question, takes clicks and keys, sends the answer. Used in ComfyUI's page and by `pcpo ab`.

const STYLE = `
.pcpo-vote { display: flex; flex-direction: column; gap: 8px; height: 100%; padding: 10px; box-sizing: border-box;
  border-radius: 8px; background: var(--comfy-menu-bg, #222); color: var(--input-text, #ddd); font: 14px/1.35 Inter, sans-serif; outline: none; }
.pcpo-vote:focus-visible { box-shadow: 0 0 0 2px #4f8cff; }
.pcpo-vote header { display: flex; align-items: baseline; gap: 10px; }
.pcpo-vote h3 { margin: 0; font-size: 16px; font-weight: 600; flex: 1; }
.pcpo-vote .prompt { opacity: .75; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.pcpo-vote .images { flex: 1; min-height: 0; display: grid; gap: 8px; place-items: center; }
.pcpo-vote .images button { position: relative; width: 100%; height: 100%; min-height: 0; padding: 0; border: 2px solid transparent; border-radius: 8px;
  background: #0003; cursor: pointer; overflow: hidden; }
.pcpo-vote .images button:hover { border-color: #4f8cff; }
.pcpo-vote .images img { width: 100%; height: 100%; object-fit: contain; display: block; }
.pcpo-vote .images .key, .pcpo-vote .images .mark { position: absolute; top: 6px; padding: 1px 7px; border-radius: 9px; font-size: 12px; }
.pcpo-vote .images .key { left: 6px; background: #000a; color: #fff; }
.pcpo-vote .images .mark { right: 6px; background: #2e7d4f; color: #fff; font-weight: 600; }
.pcpo-vote .images .chosen { border-color: #3aa86a; }
.pcpo-vote .images .worst { border-color: #c2553f; }
.pcpo-vote .images .worst .mark { background: #c2553f; }
.pcpo-vote .bar { height: 5px; border-radius: 3px; background: #0004; overflow: hidden; }
.pcpo-vote .bar div { height: 100%; background: #3aa86a; transition: width .2s; }
.pcpo-vote footer { display: flex; gap: 6px; align-items: center; }
.pcpo-vote .status { font-size: 12px; opacity: .75; }
.pcpo-vote footer { justify-content: flex-end; }
.pcpo-vote footer button, .pcpo-vote header button { padding: 4px 10px; border: 1px solid var(--border-color, #555); border-radius: 6px;
  background: var(--comfy-input-bg, #333); color: inherit; font: inherit; cursor: pointer; }
.pcpo-vote footer button:disabled { opacity: .4; cursor: default; }
.pcpo-vote .error { color: #ff9c8a; font-size: 12px; }
`;
const HINTS = {
  best: "Click the best image.",
  "best and worst": "Click the best image, then the worst.",
  ranking: "Click from best to worst; Enter leaves the rest tied.",
};

export function element(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

/** The ranks of a choice: the images chosen so far, best first; null while it is incomplete. */
export function ranksOf(chosen, count, choose, early = false) {
  const rest = Array.from({ length: count }, (_, n) => n).filter((n) => !chosen.includes(n));
  if (choose === "best") return chosen.length === 1 ? rank([chosen, rest], count) : null;
  if (choose === "best and worst" && count > 2)
    return chosen.length === 2 ? rank([[chosen[0]], rest, [chosen[1]]], count) : null;
  if (rest.length <= 1 || (early && chosen.length)) return rank([...chosen.map((n) => [n]), rest], count);
  return null;
}

function rank(levels, count) {
  const ranks = Array(count).fill(0);
  levels.filter((level) => level.length).forEach((level, place) => level.forEach((n) => (ranks[n] = place)));
  return ranks;
}

export function addStyle() {
  document.head.append(element("style", { textContent: STYLE }));
}

export class Ballot {
  /** request: fetch for the server's routes; url: an image's address there; base: where answers go; enlarge, isLarge: for pages with a large view. */
  constructor({ request, url, base = "/vote", enlarge = null, isLarge = () => false }) {
    Object.assign(this, { request, url, base, enlarge, isLarge, question: null, chosen: [], seconds: [] });
    this.root = element("div", { className: "pcpo-vote", tabIndex: 0 });
    this.root.addEventListener("keydown", (event) => this.key(event));
    for (const type of ["pointerdown", "wheel", "dblclick"]) this.root.addEventListener(type, (event) => event.stopPropagation());
  }

  /** Show a question, or none; says whether it is another one than before. */
  show(question) {
    if ((question?.id ?? null) === (this.question?.id ?? null)) return false;
    this.question = question;
    this.chosen = [];
    this.shown = performance.now();
    if (question) this.draw();
    return true;
  }

  draw(error = "") {
    const q = this.question;
    const columns = q.images.length <= 3 ? q.images.length : Math.ceil(Math.sqrt(q.images.length));
    const images = element("div", { className: "images" });
    images.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    images.style.gridTemplateRows = `repeat(${Math.ceil(q.images.length / columns)}, minmax(0, 1fr))`;
    this.buttons = q.images.map((url, n) => {
      const image = element("img", { src: this.url(url), alt: `image ${n + 1}`, draggable: false });
      return element("button", { type: "button", onclick: () => this.choose(n) }, image, element("span", { className: "key", textContent: n + 1 }));
    });
    images.append(...this.buttons);
    const done = element("div");
    done.style.width = q.total ? `${Math.min(100, (100 * (q.number - 1)) / q.total)}%` : "0";
    const button = (text, title, enabled, act) => element("button", { type: "button", textContent: text, title, disabled: !enabled, onclick: act });
    this.root.replaceChildren(
      element("header", {}, element("h3", { textContent: q.question }),
        ...(this.enlarge ? [button(this.isLarge() ? "Shrink" : "Enlarge", "Show the images over the whole page (E)", true, () => this.enlarge())] : [])),
      element("div", { className: "prompt", textContent: q.prompt, title: q.prompt }),
      images,
      element("div", { className: "bar" }, done),
      element("div", { className: "status", textContent: this.status() }),
      element("footer", {},
        (this.undoButton = button("Undo", "Take back the last choice (U)", q.can_undo, () => this.undo())),
        button("No preference", "Skip this group (S)", true, () => this.send({ action: "skip" })),
        ...(q.images.length === 2 && !q.can_finish ? [] : [button("Finish for me", q.can_finish ? "The taste learned from your votes scores the rest (F)" : "Possible after five votes", q.can_finish, () => this.send({ action: "finish" }))]),
        ...(q.choose === "ranking" ? [button("Done", "The rest is tied (Enter)", true, () => this.submit(true))] : [])),
      element("div", { className: "error", textContent: error }),
    );
    this.mark();
  }

  status() {
    const q = this.question;
    const mean = this.seconds.length ? ` - ${(this.seconds.reduce((a, b) => a + b) / this.seconds.length).toFixed(1)} s per group` : "";
    return `${q.number}${q.total ? ` of ${q.total}` : ""}${mean} - ${HINTS[q.choose]}`;
  }

  mark() {
    this.undoButton.disabled = !this.question.can_undo && !this.chosen.length;
    const both = this.question.choose === "best and worst";
    this.buttons.forEach((button, n) => {
      const place = this.chosen.indexOf(n);
      button.className = place < 0 ? "" : both && place === 1 ? "worst" : "chosen";
      button.querySelector(".mark")?.remove();
      if (place >= 0) button.append(element("span", { className: "mark", textContent: both ? (place ? "worst" : "best") : place + 1 }));
    });
  }

  choose(n) {
    if (this.chosen.includes(n)) this.chosen = this.chosen.filter((m) => m !== n);
    else this.chosen.push(n);
    this.mark();
    this.submit();
  }

  submit(early = false) {
    const ranks = ranksOf(this.chosen, this.question.images.length, this.question.choose, early);
    if (ranks) this.send({ ranks });
  }

  undo() {
    if (!this.chosen.length) return this.question.can_undo && this.send({ action: "undo" });
    this.chosen.pop();
    this.mark();
  }

  async send(body) {
    if (this.sending) return;
    this.sending = true;
    const seconds = (performance.now() - this.shown) / 1000;
    try {
      const answer = { ...body, seconds };
      const response = await this.request(`${this.base}/${this.question.id}`, { method: "POST", body: JSON.stringify(answer), headers: { "Content-Type": "application/json" } });
      if (!response.ok) this.refused((await response.json()).error);
      else if (body.ranks) this.seconds.push(seconds);
    } finally {
      this.sending = false;
    }
  }

  /** Show why an answer was not taken; the keys go on working. */
  refused(error) {
    if (!this.question) return;
    this.draw(error);
    this.root.focus();
  }

  key(event) {
    if (!this.question || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    const act = {
      enter: () => this.submit(true), u: () => this.undo(), backspace: () => this.undo(), s: () => this.send({ action: "skip" }),
      f: () => this.question.can_finish && this.send({ action: "finish" }), e: () => this.enlarge?.(),
    }[key];
    const number = /^[1-9]$/.test(key) ? +key - 1 : -1;
    if (number >= this.question.images.length || (!act && number < 0)) return;
    event.preventDefault();
    event.stopPropagation();
    if (act) act();
    else this.choose(number);
  }
}
