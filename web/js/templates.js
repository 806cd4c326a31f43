// ComfyUI lists a pack's templates in the order of its file system; the names of this pack's begin with their number.
import { api } from "../../../scripts/api.js";

const PACK = decodeURIComponent(import.meta.url.split("/extensions/")[1].split("/")[0]);
const list = api.getWorkflowTemplates.bind(api);

api.getWorkflowTemplates = async () => {
  const templates = await list();
  templates[PACK]?.sort();
  return templates;
};
