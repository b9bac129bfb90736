// The Vercel AI SDK against a server: `node ai.mjs URL MODEL`.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const [url, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "tandem", baseURL: `${url}/v1`, includeUsage: true, supportsStructuredOutputs: true,
});
const model = provider.chatModel(name);
const fruit = z.object({ weight: z.number().int().min(1).max(99) });
const brief = {
  model, prompt: "What is a list?", temperature: 0, maxOutputTokens: 16, maxRetries: 0,
};

const whole = await generateText(brief);
assert.ok(whole.usage.outputTokens <= 16);
const stream = streamText({ ...brief, onError: ({ error }) => { throw error; } });
let text = "";
for await (const part of stream.textStream) text += part;
assert.equal(text, whole.text);
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);

const { output } = await generateText({
  ...brief, maxOutputTokens: 200, output: Output.object({ schema: fruit }),
});
assert.ok(output.weight >= 1);

const weigh = tool({ description: "weighs", inputSchema: fruit });
const forced = { ...brief, maxOutputTokens: 1000, tools: { weigh }, toolChoice: "required" };
const called = await generateText(forced);
assert.equal(called.finishReason, "tool-calls");
fruit.parse(called.toolCalls[0].input);
const calling = streamText(forced);
const calls = await calling.toolCalls;
fruit.parse(calls[0].input);
assert.equal(await calling.finishReason, "tool-calls");

// The next turn sends the call and its result back.
const next = await generateText({
  ...brief, prompt: undefined,
  messages: [
    { role: "user", content: "weigh it" },
    ...called.response.messages.slice(0, 1),
    {
      role: "tool",
      content: called.toolCalls.map((call) => ({
        type: "tool-result", toolCallId: call.toolCallId, toolName: call.toolName,
        output: { type: "text", value: "12 g" },
      })),
    },
  ],
});
assert.equal(typeof next.text, "string");

const completed = await generateText({ ...brief, model: provider.completionModel(name) });
assert.equal(typeof completed.text, "string");
await assert.rejects(generateText({ ...brief, model: provider.chatModel("other") }), /does not exist/);
