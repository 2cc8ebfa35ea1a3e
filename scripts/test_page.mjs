// The page of `st-tool serve` in headless Chromium: outside CI.
//
//   npm install playwright-core@1.65.1        (in any folder; run the script from there)
//   node .../scripts/test_page.mjs target/release/st-tool [FOLDER for pictures]
//
// CHROMIUM names the browser (/usr/bin/chromium). Exit status 0: all holds.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';

const { chromium } = createRequire(path.join(process.cwd(), 'x.js'))('playwright-core');
const [program, pictures] = process.argv.slice(2);
const scratch = mkdtempSync(path.join(tmpdir(), 'st-page-'));
const PATIENCE = 120_000;

function serve(...args) {
  const child = spawn(program, ['serve', 'tiny', '--port', '0', '--threads', '1', ...args], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const address = new Promise((done, fail) => {
    child.stdout.once('data', (line) => done(String(line).trim()));
    child.once('exit', (code) => fail(new Error(`the server ended: ${code}`)));
  });
  return { child, address };
}

const server = serve();
const address = await server.address;
const args = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const options = { executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args, viewport: { width: 1280, height: 800 } };
const context = await chromium.launchPersistentContext(path.join(scratch, 'profile'), options);
let failed = 0;

async function open(settings = {}) {
  const page = await context.newPage();
  page.problems = [];
  page.on('pageerror', (error) => page.problems.push(String(error)));
  page.on('console', (message) => message.type() === 'error' && page.problems.push(message.text()));
  page.on('request', (request) => {
    if (!request.url().startsWith(address) && !request.url().startsWith('data:')) page.problems.push(`asked ${request.url()}`);
  });
  await page.goto(address);
  await page.evaluate((kept) => localStorage.setItem('st-tool', JSON.stringify({ settings: kept })), settings);
  await page.reload();
  return page;
}

const say = (page, text) => page.fill('#say', text).then(() => page.press('#say', 'Enter'));
const done = (page) => page.waitForSelector('#stop', { state: 'hidden', timeout: PATIENCE });
const answers = (page) => page.locator('article.assistant .text');
const picture = (page, name) => (pictures ? page.screenshot({ path: path.join(pictures, `${name}.png`) }) : null);

async function test(name, run, settings) {
  const page = await open(settings);
  try {
    await run(page);
    assert.deepEqual(page.problems, [], 'the browser has something to complain about');
    console.log(`ok    ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILS ${name}: ${error.stack}`);
    await picture(page, `failed-${failed}`);
  }
  await page.close();
}

// A server's answer as the test wants it: the page is what is tested here.
const scripted = (page, pieces, wait = 0) =>
  page.route('**/v1/chat/completions', async (route) => {
    const chunk = (delta, more = {}) => `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason: null }], ...more })}\n\n`;
    if (wait) await new Promise((go) => setTimeout(go, wait));
    const body = pieces.map((content) => chunk({ content })).join('') + 'data: [DONE]\n\n';
    await route.fulfill({ status: 200, contentType: 'text/event-stream', body });
  });

// The bundled model is fast: what comes of the server is handed to the page an event at a time.
async function slowly(page) {
  await page.addInitScript(() => {
    const real = window.fetch;
    window.fetch = async (...asked) => {
      const response = await real(...asked);
      if (!String(asked[0]).includes('chat/completions')) return response;
      const transform = async (chunk, controller) => {
        for (const event of new TextDecoder().decode(chunk).split(/(?<=\n\n)/)) {
          await new Promise((go) => setTimeout(go, 20));
          controller.enqueue(new TextEncoder().encode(event));
        }
      };
      return new Response(response.body.pipeThrough(new TransformStream({ transform })), response);
    };
  });
  await page.reload();
}

const SHORT = { max: '40', seed: '7' };

await test('an answer streams', async (page) => {
  await slowly(page);
  // What is shown, each time that it has changed.
  await page.evaluate(() => {
    window.lengths = new Set();
    const look = () => window.lengths.add(document.querySelector('article.assistant .text')?.textContent.length ?? 0);
    new MutationObserver(look).observe(document.getElementById('log'), { childList: true, subtree: true, characterData: true });
  });
  await say(page, 'Tell me a story.');
  await done(page);
  const lengths = await page.evaluate(() => [...window.lengths]);
  assert.ok(lengths.length > 2, `seen lengths ${lengths}`);
  const text = await answers(page).first().textContent();
  assert.ok(text.length > 10);
  assert.match(await page.locator('article.assistant .tools').textContent(), /\d+ tokens.*seed 7/);
  assert.equal(await page.evaluate(() => document.activeElement.id), 'say');
}, SHORT);

await test('an answer is stopped by the keyboard, and the chat goes on', async (page) => {
  await slowly(page);
  await say(page, 'Tell me a long story.');
  await page.waitForFunction(() => document.querySelector('article.assistant .text')?.textContent.length > 20, null, { timeout: PATIENCE });
  await page.keyboard.press('Escape');
  await done(page);
  const text = await answers(page).first().textContent();
  await page.waitForTimeout(300);
  assert.equal(await answers(page).first().textContent(), text);
  assert.match(await page.locator('article.assistant .tools').textContent(), /stopped/);
  await page.click('summary');
  await page.fill('#max', '8');
  await page.press('#max', 'Tab');
  await say(page, 'And then?');
  await done(page);
  assert.equal(await answers(page).count(), 2);
}, { seed: '1' });

await test('a message is edited, an answer is made anew', async (page) => {
  await say(page, 'Tell me about a dog.');
  await done(page);
  const first = await answers(page).first().textContent();
  await page.keyboard.press('Alt+r');
  await done(page);
  assert.equal(await answers(page).first().textContent(), first, 'the same seed, the same answer');
  await page.press('#say', 'ArrowUp');
  await page.keyboard.press('Control+a');
  await page.keyboard.type('Tell me about a frog.');
  await page.keyboard.press('Enter');
  await done(page);
  assert.equal(await page.locator('article').count(), 2);
  assert.equal(await page.locator('article.user .text').textContent(), 'Tell me about a frog.');
}, SHORT);

await test('a conversation outlives the page and goes on', async (page) => {
  await say(page, 'Tell me about a bird.');
  await done(page);
  const first = await answers(page).first().textContent();
  await page.reload();
  assert.equal(await answers(page).first().textContent(), first);
  await say(page, 'And then?');
  await done(page);
  assert.match(await page.locator('article.assistant .tools').last().textContent(), /known/, 'the beginning was not read again');
  await page.keyboard.press('Alt+n');
  assert.equal(await page.locator('article').count(), 0);
  await page.locator('#conversations li button').first().click();
  assert.equal(await page.locator('article').count(), 4);
  await page.locator('#conversations li button').nth(1).click();
  assert.equal(await page.locator('#conversations li').count(), 0);
}, SHORT);

await test('a page that is left in the middle of an answer keeps what there is', async (page) => {
  await slowly(page);
  await say(page, 'Tell me a long story.');
  await page.waitForFunction(() => document.querySelector('article.assistant .text')?.textContent.length > 20, null, { timeout: PATIENCE });
  await page.reload();
  assert.ok((await answers(page).first().textContent()).length > 10);
  assert.match(await page.locator('article.assistant .tools').textContent(), /cut off/);
}, { max: '1900', seed: '3', temperature: '1.5' });

await test('an answer of a thousand tokens', async (page) => {
  await say(page, 'Tell me a long story.');
  await done(page);
  assert.match(await page.locator('article.assistant .tools').textContent(), /(1000|[1-9]\d\d) tokens/);
  const bottom = await page.evaluate(() => { const log = document.getElementById('log'); return log.scrollHeight - log.scrollTop - log.clientHeight; });
  assert.ok(bottom < 100, `${bottom} pixels from the end`);
}, { max: '1000', seed: '3', temperature: '1.5' });

await test('a thousand pieces are shown as they come, in little time', async (page) => {
  await scripted(page, Array.from({ length: 1000 }, (_, i) => (i % 50 === 49 ? '.\n\n' : `word${i} `)));
  const start = Date.now();
  await say(page, 'Go.');
  await done(page);
  assert.match(await answers(page).textContent(), /word998/);
  assert.ok(Date.now() - start < 20_000);
});

await test('what looks like HTML stays text', async (page) => {
  const hostile = [
    '<script>window.bad = 1</script> <img src=x onerror="window.bad=2"> **<b>bold</b>** `<i>code</i>`',
    '\n\n```html\n<script>window.bad = 3</script>\n```\n\n| <u>a</u> | b |\n|---|---|\n| <img src=x onerror=bad=4> | 2 |\n\n',
    '- <svg onload=alert(1)>\n- [click](javascript:window.bad=5) [fine](https://example.com/a)\n\n> <iframe src="https://example.com">\n\n# <h1>Title</h1>\n',
    '![picture](https://example.com/p.png)',
  ];
  await scripted(page, hostile);
  await say(page, '<img src=x onerror="window.bad=6"> <b>me</b>');
  await done(page);
  const inside = await page.evaluate(() => [...document.querySelectorAll('#log .text *')].map((e) => e.tagName));
  const allowed = new Set(['P', 'BR', 'STRONG', 'CODE', 'DIV', 'PRE', 'BUTTON', 'TABLE', 'TR', 'TH', 'TD', 'UL', 'LI', 'A', 'SPAN', 'BLOCKQUOTE', 'H3', 'H4', 'H5']);
  assert.deepEqual(inside.filter((name) => !allowed.has(name)), []);
  assert.equal(await page.evaluate(() => window.bad), undefined);
  const links = await page.evaluate(() => [...document.querySelectorAll('#log a')].map((a) => a.href));
  assert.ok(links.every((link) => link.startsWith('https://example.com/')), links);
  const text = await answers(page).textContent();
  for (const said of ['<script>window.bad = 1</script>', '<b>bold</b>', '<svg onload=alert(1)>', '<iframe']) assert.ok(text.includes(said), said);
  assert.match(await page.locator('article.user .text').textContent(), /<b>me<\/b>/);
  await picture(page, 'markdown');
});

await test('the policy lets no script in', async (page) => {
  const outcome = await page.evaluate(() => {
    try { document.body.innerHTML = '<b>x</b>'; return 'taken'; } catch (error) { return error.name; }
  });
  assert.equal(outcome, 'TypeError');
  page.problems.length = 0;
});

await test('code is copied', async (page) => {
  await context.grantPermissions(['clipboard-read', 'clipboard-write'], { origin: address });
  await scripted(page, ['Here:\n\n```rust\nfn main() {}\n```\n']);
  await say(page, 'Code.');
  await done(page);
  await page.locator('.code button').click();
  await page.waitForFunction(() => document.querySelector('.code button').textContent === 'Copied');
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), 'fn main() {}');
});

await test('the machine is seen at work', async (page) => {
  await say(page, 'Tell me a long story.');
  await page.waitForFunction(() => /\d/.test(document.getElementById('rate').textContent), null, { timeout: PATIENCE });
  const lit = await page.evaluate(() => {
    const canvas = document.getElementById('grid');
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    const colours = new Set();
    for (let i = 0; i < data.length; i += 4) colours.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
    return colours.size;
  });
  assert.ok(lit > 3, `${lit} colours`);
  assert.match(await page.textContent('#memory'), /MiB/);
  assert.match(await page.textContent('#busy'), /of/);
  await picture(page, 'light');
  await page.keyboard.press('Escape');
}, { temperature: '1.5' });

await test('dark, and 360 pixels wide', async (page) => {
  await page.emulateMedia({ colorScheme: 'dark' });
  await say(page, 'Tell me about a cat.');
  await done(page);
  await picture(page, 'dark');
  const background = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  assert.equal(background, 'rgb(22, 24, 27)');
  await page.setViewportSize({ width: 360, height: 740 });
  await page.reload();
  const overflows = () => page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  assert.equal(await overflows(), false);
  await picture(page, 'narrow-dark');
  await page.emulateMedia({ colorScheme: 'light' });
  await picture(page, 'narrow-light');
  await page.keyboard.press('Alt+m');
  assert.equal(await overflows(), false);
  await page.waitForTimeout(600);
  await picture(page, 'narrow-machine');
  await page.keyboard.press('Alt+m');
  await page.keyboard.press('Alt+c');
  assert.equal(await overflows(), false);
  await picture(page, 'narrow-list');
}, SHORT);

await test('everything is reached by the keyboard', async (page) => {
  const reached = new Set();
  for (let i = 0; i < 40; i += 1) {
    await page.keyboard.press('Tab');
    reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.tagName));
  }
  for (const id of ['show-list', 'show-machine', 'new', 'log', 'say', 'send', 'SUMMARY']) assert.ok(reached.has(id), `${id} of ${[...reached]}`);
});

await context.close();
server.child.kill('SIGTERM');

const locked = serve('--api-key', 'sesame');
const lockedAddress = await locked.address;
const second = await chromium.launchPersistentContext(path.join(scratch, 'profile2'), options);
const page = await second.newPage();
await page.goto(lockedAddress);
await page.waitForFunction(() => document.getElementById('settings').open);
await page.fill('#key', 'sesame');
await page.press('#key', 'Tab');
await page.fill('#max', '8');
await page.press('#max', 'Tab');
await say(page, 'Hello.');
await done(page);
const ok = (await answers(page).first().textContent()).length > 0;
console.log(ok ? 'ok    a key is asked for and taken' : 'FAILS a key is asked for and taken');
await second.close();
locked.child.kill('SIGTERM');
process.exitCode = failed || !ok ? 1 : 0;
