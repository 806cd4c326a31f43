// Open a workflow in ComfyUI's page as a template, report its nodes and zoom, queue it, wait, and take screenshots.
//   node browser.mjs URL WORKFLOW.json OUT_FOLDER TIMEOUT_SECONDS [SAVE_AS.json]
// Needs PLAYWRIGHT_MODULES (a folder in which `npm i playwright-core` was run) and CHROMIUM (the browser's path).
// Prints one line of JSON.
import { createRequire } from 'node:module';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

const [width, height] = (process.env.PCPO_VIEWPORT ?? "1440x900").split("x").map(Number);
const VIEWPORT = { width, height };
const [url, file, out, seconds, saveAs] = process.argv.slice(2);
const { chromium } = createRequire(path.join(process.env.PLAYWRIGHT_MODULES, 'x.js'))('playwright-core');
const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'pcpo-browser-'));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM, headless: true, viewport: VIEWPORT,
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking'],
});
const result = { errors: [], missing: [], dialogs: [], status: 'not queued' };
try {
  const page = context.pages()[0];
  page.on('pageerror', e => result.errors.push(e.message));
  await context.route(u => u.hostname !== '127.0.0.1', route => route.abort());
  const settings = { 'Comfy.TutorialCompleted': true, 'Comfy.Release.Status': 'skipped', 'Comfy.Workflow.Persist': false, 'Comfy.Minimap.Visible': false };
  for (const [key, value] of Object.entries(settings))
    await fetch(`${url}/api/settings/${key}`, { method: 'POST', body: JSON.stringify(value), headers: { 'content-type': 'application/json' } });
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types?.PCPOTrainLoRA, null, { timeout: 120000 });
  await page.waitForTimeout(1500);
  const workflow = JSON.parse(fs.readFileSync(file, 'utf8'));
  await page.evaluate(w => window.app.loadGraphData(w, true, true, 'workflow', { openSource: 'template' }), workflow);
  await page.waitForTimeout(1500);
  const sizes = () => page.evaluate(() => Object.fromEntries(window.app.graph.nodes.map(n => [`${n.id} ${n.type}`, [...n.size]])));
  const before = await sizes();
  const seen = await page.evaluate(async () => ({
    widgets: window.app.graph.nodes.filter(n => n.type === 'PCPOTrainLoRA').map(n => n.widgets.filter(w => n.isWidgetVisible(w)).length),
    zoom: window.app.canvas.ds.scale, textless: window.app.canvas.low_quality,
    missing: window.app.graph.nodes.filter(n => n.has_errors || !window.LiteGraph.registered_node_types[n.type]).map(n => n.type),
    dialogs: [...document.querySelectorAll('.p-dialog')].map(d => d.innerText.slice(0, 300)),
    api: (await window.app.graphToPrompt()).output, graph: window.app.graph.serialize(),
  }));
  Object.assign(result, { missing: seen.missing, dialogs: seen.dialogs, nodes: Object.keys(seen.api).length, zoom: seen.zoom, textless: seen.textless, widgets: seen.widgets });
  if (saveAs) fs.writeFileSync(saveAs, JSON.stringify({ graph: seen.graph, api: seen.api }, null, 1));
  await page.screenshot({ path: path.join(out, 'loaded.png') });
  if (+seconds > 0 && !seen.missing.length) {
    const known = Object.keys(await (await fetch(`${url}/history`)).json());
    await page.evaluate(() => window.app.queuePrompt(0, 1).catch(e => String(e)));
    const end = Date.now() + 1000 * seconds;
    result.status = 'timeout';
    for (let shot = 0; Date.now() < end; shot++) {
      const history = await (await fetch(`${url}/history`)).json();
      const mine = Object.keys(history).find(k => !known.includes(k));
      if (mine) {
        const { status, outputs } = history[mine];
        Object.assign(result, { status: status.status_str, outputs, messages: status.messages.filter(m => m[0] === 'execution_error') });
        break;
      }
      if (shot % 10 === 9) await page.screenshot({ path: path.join(out, 'running.png') });
      await page.waitForTimeout(500);
    }
    await page.waitForTimeout(2500);
    const after = await sizes();
    result.grown = Object.keys(before).filter(n => String(before[n]) !== String(after[n]));
    await page.screenshot({ path: path.join(out, 'done.png') });
  }
} catch (error) {
  result.status = `failed: ${error.message}`;
} finally {
  await context.close();
  fs.rmSync(profile, { recursive: true, force: true });
}
console.log(JSON.stringify(result));
