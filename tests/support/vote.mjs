// Vote in ComfyUI's page: open a workflow, queue it, click through the questions, undo once, close the page and come back.
//   node vote.mjs URL WORKFLOW.json OUT_FOLDER VOTES TIMEOUT_SECONDS
// Needs PLAYWRIGHT_MODULES and CHROMIUM as browser.mjs does. Prints one line of JSON.
import { createRequire } from 'node:module';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

const [url, file, out, wanted, seconds] = process.argv.slice(2);
const { chromium } = createRequire(path.join(process.env.PLAYWRIGHT_MODULES, 'x.js'))('playwright-core');
const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'pcpo-browser-'));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM, headless: true, viewport: { width: 1440, height: 900 },
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking'],
});
const result = { errors: [], votes: 0, undone: 0, reopened: false, status: 'not queued' };
const workflow = JSON.parse(fs.readFileSync(file, 'utf8'));

async function open() {
  const page = await context.newPage();
  page.on('pageerror', e => result.errors.push(e.message));
  await page.goto(url, { waitUntil: 'domcontentloaded' });
  await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types?.PCPOHumanVote, null, { timeout: 120000 });
  await page.waitForTimeout(1500);
  await page.evaluate(w => window.app.loadGraphData(w, true, true, 'workflow'), workflow);
  await page.waitForTimeout(1500);
  return page;
}
// In another workflow, whose node of the asking node's number is of another kind: images in the dialog, and back on the node.
async function elsewhere(page, node) {
  const other = { last_node_id: Number(node), last_link_id: 0, links: [], groups: [], version: 0.4, nodes: [{ id: Number(node), type: 'EmptyLatentImage', pos: [100, 100], size: [270, 110], flags: {}, order: 0, mode: 0, inputs: [], outputs: [], widgets_values: [64, 64, 1] }] };
  const shown = () => page.locator('dialog.pcpo-vote-page[open] .images img').count();
  await page.evaluate(w => window.app.loadGraphData(w, true, true, 'other'), other);
  await page.waitForTimeout(1000);
  await page.screenshot({ path: path.join(out, 'elsewhere.png') });
  const there = await shown();
  await page.evaluate(w => window.app.loadGraphData(w, true, true, 'workflow'), workflow);
  await page.waitForTimeout(1500);
  return [there, await shown()];
}
const question = async () => (await fetch(`${url}/pcpo/vote`)).json();
const history = async () => Object.entries(await (await fetch(`${url}/history`)).json());

try {
  await context.route(u => u.hostname !== '127.0.0.1', route => route.abort());
  const settings = { 'Comfy.TutorialCompleted': true, 'Comfy.Release.Status': 'skipped', 'Comfy.Workflow.Persist': false, 'Comfy.Minimap.Visible': false };
  for (const [key, value] of Object.entries(settings))
    await fetch(`${url}/api/settings/${key}`, { method: 'POST', body: JSON.stringify(value), headers: { 'content-type': 'application/json' } });
  let page = await open();
  await page.screenshot({ path: path.join(out, 'loaded.png') });
  const earlier = new Set((await history()).map(([id]) => id)); // what other tests ran in the same ComfyUI
  await page.evaluate(() => window.app.queuePrompt(0, 1));
  const end = Date.now() + 1000 * seconds;
  let last = null;
  while (Date.now() < end) {
    const asked = await question();
    if (asked.open && asked.id !== last) {
      const images = page.locator('.pcpo-vote .images button');
      await page.waitForFunction(() => [...document.querySelectorAll('.pcpo-vote .images img')].every(i => i.complete && i.naturalWidth) && document.querySelectorAll('.pcpo-vote .images img').length > 1, null, { timeout: 60000 });
      last = asked.id;
      if (asked.number >= 2 && !result.undone) {
        await page.locator('.pcpo-vote footer button', { hasText: 'Undo' }).click();
        result.undone++;
        continue;
      }
      if (asked.number >= 4 && !result.reopened) { // close the page in the middle of a question and come back
        await page.screenshot({ path: path.join(out, 'voting.png') });
        await page.close();
        page = await open();
        await page.waitForSelector('.pcpo-vote .images img', { timeout: 60000 });
        await page.waitForTimeout(800);
        await page.screenshot({ path: path.join(out, 'reopened.png') });
        await page.locator('.pcpo-vote header button').click();
        await page.waitForTimeout(400);
        await page.screenshot({ path: path.join(out, 'enlarged.png') });
        result.enlarged = await page.locator('dialog.pcpo-vote-page[open] .images img').count();
        await page.locator('.pcpo-vote header button').click();
        result.elsewhere = await elsewhere(page, asked.node);
        result.reopened = true;
      }
      if (asked.number % 2) { // by mouse, then by keyboard
        await page.locator('.pcpo-vote .images button').nth(0).click();
        await page.keyboard.press('u'); // the keys go on working after a click that is taken back
        await page.keyboard.press('1');
        await page.locator('.pcpo-vote .images button').nth(1).click();
      } else {
        await page.locator('.pcpo-vote').focus();
        await page.keyboard.press('2');
        await page.keyboard.press('1');
      }
      result.votes++;
    }
    const done = (await history()).find(([id, entry]) => !earlier.has(id) && entry.status?.completed !== undefined)?.[1];
    if (done) {
      Object.assign(result, { status: done.status.status_str, messages: done.status.messages.filter(m => m[0] === 'execution_error') });
      break;
    }
    await page.waitForTimeout(100);
  }
  await page.waitForTimeout(2500);
  result.panel = await page.locator('.pcpo-vote .images img').count();
  await page.screenshot({ path: path.join(out, 'done.png') });
} catch (error) {
  result.status = `failed: ${error.message}`;
} finally {
  await context.close();
  fs.rmSync(profile, { recursive: true, force: true });
}
console.log(JSON.stringify(result));
