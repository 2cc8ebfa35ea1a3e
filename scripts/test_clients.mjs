// Real JavaScript clients against `st-tool serve tiny`: outside CI.
//
//   npm install openai@6.49.0 @anthropic-ai/sdk@1.14.0        (in any folder; run the script from there)
//   node .../scripts/test_clients.mjs target/release/st-tool
//
// The bundled model speaks simple English, so what matters is enforced by schemas and tools. Exit status 0: all holds.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createRequire } from 'node:module';
import path from 'node:path';

const here = createRequire(path.join(process.cwd(), 'x.js'));
const { OpenAI, BadRequestError, AuthenticationError } = here('openai');
const { Anthropic } = here('@anthropic-ai/sdk');

const server = spawn(process.argv[2], ['serve', 'tiny', '--port', '0', '--threads', '1', '--api-key', 'sesame'], {
  stdio: ['ignore', 'pipe', 'inherit'],
});
const address = await new Promise((done) => server.stdout.once('data', (line) => done(String(line).trim())));
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: 'sesame', maxRetries: 0 });
const claude = new Anthropic({ baseURL: address, apiKey: 'sesame', maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: 'user', content: 'Tell me about a cat.' }];
const parameters = {
  type: 'object',
  properties: { city: { type: 'string', maxLength: 12 }, unit: { enum: ['celsius', 'fahrenheit'] } },
  required: ['city', 'unit'],
  additionalProperties: false,
};
const tools = [{ type: 'function', function: { name: 'weather', description: 'The weather.', parameters } }];
const fits = (value) => assert.ok(['celsius', 'fahrenheit'].includes((typeof value === 'string' ? JSON.parse(value) : value).unit));
let failed = 0;

async function test(name, run) {
  try {
    await run();
    console.log(`ok    ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILS ${name}: ${error.stack}`);
  }
}

await test('openai: chat, whole and streamed', async () => {
  const ask = { model, messages, max_tokens: 20, seed: 1 };
  const whole = await client.chat.completions.create(ask);
  const stream = await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } });
  let [text, usage] = ['', null];
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, 20);
});

await test('openai: a schema', async () => {
  const response_format = { type: 'json_schema', json_schema: { name: 'w', strict: true, schema: parameters } };
  for (let seed = 0; seed < 4; seed += 1) {
    const answer = await client.chat.completions.parse({ model, messages, seed, response_format });
    fits(answer.choices[0].message.parsed);
  }
});

await test('openai: tools, whole and streamed', async () => {
  const ask = { model, messages, tools, tool_choice: 'required', parallel_tool_calls: false, seed: 2 };
  const answer = await client.chat.completions.create(ask);
  fits(answer.choices[0].message.tool_calls[0].function.arguments);
  const streamed = await client.chat.completions.stream(ask).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.tool_calls[0].function.arguments, answer.choices[0].message.tool_calls[0].function.arguments);
});

await test('openai: functions are run', async () => {
  let called = 0;
  const run = (args) => {
    fits(args);
    called += 1;
    return 'It is warm.';
  };
  const runnable = [{ type: 'function', function: { name: 'weather', description: 'The weather.', parameters, parse: JSON.parse, function: run } }];
  const runner = client.chat.completions.runTools(
    { model, messages, tools: runnable, tool_choice: { type: 'function', function: { name: 'weather' } }, max_tokens: 200, seed: 3 },
    { maxChatCompletions: 1 },
  );
  await runner.done();
  assert.equal(called, 1);
});

await test('openai: responses', async () => {
  const answer = await client.responses.create({ model, input: 'Hello.', max_output_tokens: 12 });
  assert.ok(answer.output_text.length > 0);
  const tool = { type: 'function', name: 'weather', parameters, strict: true };
  const stream = client.responses.stream({ model, input: messages, tools: [tool], tool_choice: 'required', parallel_tool_calls: false });
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  const final = await stream.finalResponse();
  fits(final.output[0].arguments);
  assert.equal(kinds.at(-1), 'response.completed');
});

await test('openai: eight at once are the eight alone', async () => {
  const ask = (seed) => client.chat.completions.create({ model, messages, max_tokens: 20, seed }).then((a) => a.choices[0].message.content);
  const seeds = [0, 1, 2, 3, 4, 5, 6, 7];
  const together = await Promise.all(seeds.map(ask));
  for (const seed of seeds) assert.equal(await ask(seed), together[seed]);
});

await test('openai: errors', async () => {
  await assert.rejects(new OpenAI({ baseURL: `${address}/v1`, apiKey: 'x', maxRetries: 0 }).models.list(), AuthenticationError);
  await assert.rejects(client.chat.completions.create({ model, messages: [] }), BadRequestError);
});

await test('anthropic: messages, whole and streamed', async () => {
  const ask = { model, max_tokens: 20, messages, temperature: 0 };
  const whole = await claude.messages.create(ask);
  const stream = claude.messages.stream(ask);
  assert.equal(await stream.finalText(), whole.content[0].text);
  const counted = await claude.messages.countTokens({ model, messages });
  assert.equal(counted.input_tokens, whole.usage.input_tokens + whole.usage.cache_read_input_tokens);
});

await test('anthropic: tools', async () => {
  const tool = { name: 'weather', description: 'The weather.', input_schema: parameters };
  const ask = { model, max_tokens: 400, messages, tools: [tool], tool_choice: { type: 'tool', name: 'weather' } };
  const answer = await claude.messages.create(ask);
  assert.equal(answer.stop_reason, 'tool_use');
  fits(answer.content[0].input);
  const final = await claude.messages.stream(ask).finalMessage();
  fits(final.content[0].input);
});

server.kill('SIGTERM');
const status = await new Promise((done) => server.once('exit', done));
assert.equal(status, 0);
console.log(failed ? `${failed} failed` : 'all hold');
process.exitCode = failed ? 1 : 0;
