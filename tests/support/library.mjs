// What ComfyUI's page lists: the templates of an extension, and the nodes that a word finds.
//   node library.mjs URL OUT_FOLDER EXTENSION WORD
// Needs PLAYWRIGHT_MODULES and CHROMIUM, as browser.mjs does. Prints one line of JSON.
import { createRequire } from 'node:module';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

const [url, out, extension, word] = process.argv.slice(2);
const { chromium } = createRequire(path.join(process.env.PLAYWRIGHT_MODULES, 'x.js'))('playwright-core');
const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'pcpo-browser-'));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM, headless: true, viewport: { width: 1440, height: 900 },
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking'],
});
const execute = (page, command) => page.evaluate(c => window.app.extensionManager.command.execute(c), command);
const result = { templates: [], found: [] };
try {
  const page = context.pages()[0];
  await context.route(u => u.hostname !== '127.0.0.1', route => route.abort());
  const settings = { 'Comfy.TutorialCompleted': true, 'Comfy.Release.Status': 'skipped', 'Comfy.Workflow.Persist': false };
  for (const [key, value] of Object.entries(settings))
    await fetch(`${url}/api/settings/${key}`, { method: 'POST', body: JSON.stringify(value), headers: { 'content-type': 'application/json' } });
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types?.PCPOTrainLoRA, null, { timeout: 120000 });
  await page.waitForTimeout(2000);
  await execute(page, 'Workspace.SearchBox.Toggle');
  await page.waitForTimeout(1000);
  await page.keyboard.type(word, { delay: 60 });
  await page.waitForTimeout(1500);
  await page.screenshot({ path: path.join(out, 'search.png') });
  result.found = await page.locator('[data-testid="result-item"]').allInnerTexts();
  await page.keyboard.press('Escape');
  await execute(page, 'Comfy.BrowseTemplates');
  await page.getByText(extension, { exact: true }).first().click();
  await page.waitForTimeout(2000);
  await page.screenshot({ path: path.join(out, 'templates.png') });
  const prefix = 'template-workflow-';
  result.templates = await page.locator(`[data-testid^="${prefix}"]`).evaluateAll(
    (cards, n) => cards.map(card => card.dataset.testid.slice(n)), prefix.length);
} finally {
  await context.close();
  fs.rmSync(profile, { recursive: true, force: true });
}
console.log(JSON.stringify(result));
