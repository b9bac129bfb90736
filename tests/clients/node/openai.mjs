// The official OpenAI client for Node against a server: `node openai.mjs URL MODEL`.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is a list?" }];
const weigh = {
  type: "function",
  function: {
    name: "weigh",
    parameters: {
      type: "object",
      properties: { grams: { type: "integer", minimum: 1, maximum: 99 } },
      required: ["grams"],
      additionalProperties: false,
    },
  },
};

const names = [];
for await (const each of client.models.list()) names.push(each.id);
assert.deepEqual(names, [model]);
assert.equal((await client.models.retrieve(model)).id, model);

const brief = { model, messages, temperature: 0, max_completion_tokens: 16 };
const whole = await client.chat.completions.create({ ...brief, n: 2 });
assert.equal(whole.choices[0].message.content, whole.choices[1].message.content);
const texts = ["", ""];
let usage = null;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...brief, ...options, n: 2 })) {
  for (const choice of chunk.choices) texts[choice.index] += choice.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.deepEqual(texts, whole.choices.map((choice) => choice.message.content));
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

// The helper that collects a stream is strict about the order of its chunks.
const runner = client.chat.completions.stream({
  ...brief, max_completion_tokens: 200, tools: [weigh], tool_choice: "required",
  parallel_tool_calls: false,
});
const final = await runner.finalChatCompletion();
assert.equal(final.choices[0].finish_reason, "tool_calls");
const [call] = final.choices[0].message.tool_calls;
assert.ok(JSON.parse(call.function.arguments).grams >= 1);
await client.chat.completions.create({
  ...brief,
  messages: [
    ...messages, final.choices[0].message,
    { role: "tool", tool_call_id: call.id, content: "12 g" },
  ],
});

const completion = await client.completions.create({
  model, prompt: ["the tide", "the moon"], max_tokens: 4, echo: true, temperature: 0,
});
assert.ok(completion.choices[1].text.startsWith("the moon"));

const response = await client.responses.create({ model, input: "the tide", max_output_tokens: 16 });
assert.equal(typeof response.output_text, "string");
let streamed = "";
let last = null;
const events = await client.responses.create({
  model, input: "the tide", max_output_tokens: 16, temperature: 0, stream: true,
});
for await (const event of events) {
  if (event.type === "response.output_text.delta") streamed += event.delta;
  last = event;
}
assert.ok(["response.completed", "response.incomplete"].includes(last.type));
assert.equal(last.response.output[0].content[0].text, streamed);

await assert.rejects(
  client.chat.completions.create({ ...brief, temperature: -1 }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
);
await assert.rejects(
  client.chat.completions.create({ ...brief, model: "other" }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
const stopped = await client.chat.completions.create({ ...brief, stream: true });
for await (const _ of stopped) break; // leaves in the middle
