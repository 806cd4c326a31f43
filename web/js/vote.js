// Human Vote and Compare Blind in ComfyUI's page: the voting panel on the asking node, or enlarged over the page.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { Ballot, addStyle, element } from "./ballot.js";

const NODES = ["PCPOHumanVote", "PCPOCompareBlind"];
const [WIDTH, HEIGHT] = [480, 560]; // of a node that asks
const DIALOG = `
dialog.pcpo-vote-page { width: min(1100px, 94vw); height: min(860px, 92vh); padding: 0; border: 1px solid var(--border-color, #555);
  border-radius: 10px; background: var(--comfy-menu-bg, #222); overflow: hidden; }
dialog.pcpo-vote-page::backdrop { background: #000a; }
`;

let ballot, dialog;
let enlarged = false; // by the user
let centred = null; // the node that the view was moved to

function setEnlarged(value) {
  enlarged = value;
  if (ballot.question) place();
}

/** Fetch the open question and show it, or close the panel. */
async function refresh() {
  const question = await (await api.fetchApi("/pcpo/vote")).json();
  if (ballot.show(question.open ? question : null)) place();
}

/** Put the panel on the asking node, or over the page if the node is elsewhere or the panel is enlarged. */
function place() {
  const asking = ballot.question && app.graph.getNodeById(ballot.question.node);
  const here = asking?.pcpoHost && asking.graph === app.canvas.graph; // not in another workflow, nor out of view
  const over = Boolean(ballot.question) && (enlarged || !here);
  for (const node of app.graph.nodes) if (node.pcpoHost) host(node, node === asking && !over ? ballot.root : null);
  if (over) dialog.replaceChildren(ballot.root);
  if (over && !dialog.open) dialog.showModal();
  if (!over && dialog.open) dialog.close();
  if (!ballot.question) return ballot.root.remove();
  if (asking && !over && centred !== asking) {
    centred = asking;
    app.canvas.centerOnNode(asking);
  }
  ballot.draw();
  requestAnimationFrame(() => ballot.root.focus({ preventScroll: true }));
}

/** Show the panel on a node, or hide it; the node then gets its own size back. */
function host(node, root) {
  const place = node.pcpoHost;
  if (root) place.append(root);
  if (place.isOpen === Boolean(root)) return;
  place.isOpen = Boolean(root);
  place.style.display = root ? "" : "none";
  if (root) {
    place.size = [...node.size];
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1] + HEIGHT]);
  } else if (place.size) node.setSize(place.size);
  app.graph.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "pcpo.vote",
  async setup() {
    addStyle();
    document.head.append(element("style", { textContent: DIALOG }));
    dialog = element("dialog", { className: "pcpo-vote-page" });
    dialog.addEventListener("cancel", (event) => { // Escape
      event.preventDefault();
      setEnlarged(false);
    });
    document.body.append(dialog);
    ballot = new Ballot({
      request: (path, options) => api.fetchApi(path, options), url: (path) => api.apiURL(path), base: "/pcpo/vote",
      enlarge: () => setEnlarged(!enlarged), isLarge: () => enlarged,
    });
    api.addEventListener("pcpo.vote", refresh);
    api.addEventListener("reconnected", refresh);
    app.canvas.canvas.addEventListener("litegraph:set-graph", () => ballot.question && place()); // into a subgraph, or out
    await refresh();
  },
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    node.pcpoHost = element("div");
    node.pcpoHost.style.display = "none";
    node.addDOMWidget("ballot", "pcpo_ballot", node.pcpoHost, {
      serialize: false,
      getMinHeight: () => (node.pcpoHost.isOpen ? HEIGHT : 0),
      getMaxHeight: () => (node.pcpoHost.isOpen ? 4 * HEIGHT : 0),
    });
  },
  afterConfigureGraph() {
    centred = null;
    if (ballot?.question) place();
  },
});
