// The page of `st-tool profile` in headless Chromium, against its profile.json: outside CI.
//
//   npm install playwright-core@1.65.1        (in any folder; run the script from there)
//   node .../scripts/test_report.mjs FOLDER [FOLDER for pictures]
//
// FOLDER is what `st-tool profile -o FOLDER` wrote. CHROMIUM names the browser (/usr/bin/chromium). Exit status 0: all holds.

import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const { chromium } = createRequire(path.join(process.cwd(), 'x.js'))('playwright-core');
const [folder, pictures] = process.argv.slice(2);
const profile = JSON.parse(readFileSync(path.join(folder, 'profile.json'), 'utf8'));
const args = ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--allow-file-access-from-files'];
const options = { executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args, viewport: { width: 1280, height: 900 } };
const context = await chromium.launchPersistentContext(path.join(mkdtempSync(path.join(tmpdir(), 'st-report-')), 'profile'), options);
const report = pathToFileURL(path.resolve(folder, 'report.html')).href;
let failed = 0;

async function test(name, run, { address = report, width = 1280, scheme = 'light' } = {}) {
  const page = await context.newPage();
  const problems = [];
  page.on('pageerror', (error) => problems.push(String(error)));
  page.on('console', (message) => message.type() === 'error' && problems.push(message.text()));
  page.on('request', (request) => request.url() !== address && problems.push(`asked ${request.url()}`));
  try {
    await page.setViewportSize({ width, height: 900 });
    await page.emulateMedia({ colorScheme: scheme });
    await page.goto(address);
    await run(page);
    assert.deepEqual(problems, [], 'the browser has something to complain about');
    console.log(`ok    ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILS ${name}: ${error.stack}`);
  }
  await page.close();
}

const picture = (page, name) => (pictures ? page.screenshot({ path: path.join(pictures, `${name}.png`), fullPage: true }) : null);
const { texts, layers, experts } = profile;
const number = (i) => (texts.length > 1 ? `-${i + 1}` : '');
const near = (a, b) => assert.ok(Math.abs(a - b) < 1e-5, `${a} is not ${b}`);
const values = (page, selector) => page.$$eval(selector, (marks) => marks.map((mark) => Number(mark.dataset.value)));

await test('every expert of every layer has a cell with its value', async (page) => {
  for (const [i, text] of texts.entries()) {
    const cells = await values(page, `#experts${number(i)} .cell`);
    assert.equal(cells.length, layers * experts);
    text.frequency.flat().forEach((share, at) => near(cells[at], share));
    const sorted = await values(page, `#experts-sorted${number(i)} .cell`);
    text.frequency.map((layer) => [...layer].sort((a, b) => b - a)).flat().forEach((share, at) => near(sorted[at], share));
  }
});

await test('a brighter cell is a more frequent expert', async (page) => {
  const cells = await page.$$eval(`#experts${number(0)} .cell`, (marks) =>
    marks.map((mark) => {
      const [r, g, b] = getComputedStyle(mark).fill.match(/\d+/g).map(Number);
      return [Number(mark.dataset.value), 0.2126 * r + 0.7152 * g + 0.0722 * b];
    }),
  );
  cells.sort((a, b) => a[0] - b[0]);
  assert.ok(cells.every(([, light], i) => i === 0 || light >= cells[i - 1][1] - 3), 'light does not grow with the value');
});

await test('boxes stand where the quartiles are', async (page) => {
  for (const [i, text] of texts.entries()) {
    const boxes = await page.$$eval(`#sparsity${number(i)} .box`, (marks) => marks.map((mark) => [Number(mark.dataset.value), Number(mark.getAttribute('height'))]));
    assert.equal(boxes.length, layers);
    // The axis from 0 to 1 is 212 units high.
    text.sparsity.forEach((q, at) => {
      near(boxes[at][0], q.median);
      assert.ok(Math.abs(boxes[at][1] - Math.max(0.5, 212 * (q.p75 - q.p25))) < 0.2, `layer ${at}: ${boxes[at][1]}`);
    });
  }
});

await test('lines go through the figures', async (page) => {
  near((await values(page, '#locality .point[data-value]'))[0], texts[0].locality[0].share);
  const found = await values(page, '#cache .point[data-value]');
  texts.flatMap((text) => text.caches).forEach((cache, at) => near(found[at], cache.hit_rate));
});

await test('every picture has a name, a description and its numbers as a table', async (page) => {
  const figures = await page.$$eval('figure', (all) =>
    all.map((figure) => ({
      named: Boolean(figure.querySelector('svg[role=img] > title')?.textContent && figure.querySelector('svg > desc')?.textContent),
      rows: figure.querySelectorAll('table tr').length,
      heads: figure.querySelectorAll('th[scope=row]').length,
    })),
  );
  assert.ok(figures.length >= 3 * texts.length + 3);
  for (const figure of figures) assert.ok(figure.named && figure.rows > 1 && figure.heads === figure.rows - 1, JSON.stringify(figure));
  await page.click('details >> nth=0');
  assert.ok(await page.isVisible('details >> nth=0 >> table'));
});

for (const scheme of ['light', 'dark']) {
  await test(`it can be read: ${scheme}`, async (page) => {
    const contrast = await page.evaluate(() => {
      const light = (color) => {
        const part = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = color.match(/\d+/g).map(Number).map(part);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const between = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const page = light(getComputedStyle(document.body).backgroundColor);
      const paper = light(getComputedStyle(document.querySelector('.paper')).fill);
      const texts = [...document.querySelectorAll('svg text')].map((text) => between(light(getComputedStyle(text).fill), paper));
      return [between(light(getComputedStyle(document.body).color), page), Math.min(...texts)];
    });
    assert.ok(contrast.every((ratio) => ratio >= 4.5), `contrast ${contrast}`);
    await picture(page, scheme);
  }, { scheme });
}

await test('a phone of 360 pixels shows it without scrolling the page sideways', async (page) => {
  const [inner, all] = await page.evaluate(() => [window.innerWidth, document.documentElement.scrollWidth]);
  assert.ok(all <= inner, `${all} of ${inner}`);
  await picture(page, 'narrow');
}, { width: 360 });

for (const name of readdirSync(folder).filter((name) => name.endsWith('.svg'))) {
  await test(`${name} stands alone`, async (page) => {
    assert.equal(await page.evaluate(() => document.documentElement.localName), 'svg');
    assert.ok((await page.evaluate(() => getComputedStyle(document.querySelector('text')).fill)) !== 'none');
  }, { address: pathToFileURL(path.resolve(folder, name)).href });
}

await context.close();
process.exit(failed ? 1 : 0);
