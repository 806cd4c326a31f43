// The classic node renderer draws every widget; here it leaves out those that a schema calls advanced, as the new one does.
// "Show Advanced" in the node's menu brings them back.
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "pcpo.advanced",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("PCPO") || !node.widgets?.some((widget) => widget.options?.advanced)) return;
    for (const widget of node.widgets) widget.advanced = Boolean(widget.options?.advanced);
    const shown = (widget) =>
      !widget.hidden && (!widget.advanced || node.showAdvanced || node.getSlotFromWidget(widget)?.link != null);
    node.isWidgetVisible = (widget) => !node.collapsed && shown(widget);
    node.getLayoutWidgets = () => node.widgets?.filter(shown) ?? [];
    node.setSize(node.computeSize());
  },
});
