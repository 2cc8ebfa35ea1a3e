//! What clients of several APIs ask of `st-tool serve` beside plain text: formats, tools, responses, messages, the page. Real
//! connections, the bundled model, which speaks simple English: what matters is enforced.

use serde_json::{Value, json};

use crate::http::Server;

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";

fn weather() -> Value {
    json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": false,
    })
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "description": "Looks.", "parameters": weather()}})
}

fn ask() -> Value {
    json!([{"role": "user", "content": "What is it like in Paris?"}])
}

/// A chat with `more` fields.
fn chat(more: &Value) -> Value {
    with(&json!({"messages": ask(), "seed": 3, "max_tokens": 400, "temperature": 1}), more)
}

fn with(base: &Value, more: &Value) -> Value {
    let mut all = base.as_object().expect("an object").clone();
    all.extend(more.as_object().expect("an object").clone());
    all.into()
}

#[track_caller]
fn fits(arguments: &Value) {
    let parsed = arguments.as_str().map(|text| serde_json::from_str(text).expect("JSON"));
    let value: Value = parsed.unwrap_or_else(|| arguments.clone());
    let fields = value.as_object().expect("an object");
    assert_eq!(fields.keys().collect::<Vec<_>>(), ["city", "unit"], "{value}");
    assert!(value["city"].as_str().is_some_and(|city| city.chars().count() <= 8), "{value}");
    assert!(value["unit"] == "celsius" || value["unit"] == "fahrenheit", "{value}");
}

/// The events of a stream, by name, to its end.
fn events(server: &Server, path: &str, body: &Value) -> Vec<(String, Value)> {
    let mut stream = server.stream(path, &with(body, &json!({"stream": true})));
    let mut events = Vec::new();
    while let Some(event) = stream.next() {
        let Some((name, data)) = event.split_once('\n') else { continue };
        let name = name.strip_prefix("event: ").expect("a name").to_owned();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!(data["type"], name.as_str());
        events.push((name, data));
    }
    events
}

#[test]
fn answers_have_the_format_that_is_asked_for() {
    let server = Server::start(&[]);
    let schema = json!({"type": "json_schema", "json_schema": {"name": "w", "strict": true, "schema": weather()}});
    for seed in 0..4 {
        let answer = server.ask(CHAT, &chat(&json!({"response_format": schema, "seed": seed})));
        fits(&answer["choices"][0]["message"]["content"]);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    // Streamed, in company and with logprobs (one token a pass) it is the same.
    let body = chat(&json!({"response_format": schema, "n": 3}));
    let answer = server.ask(CHAT, &body);
    let text = |index: usize| answer["choices"][index]["message"]["content"].as_str().expect("text");
    let chunks = server.stream(CHAT, &with(&body, &json!({"stream": true, "logprobs": true}))).all();
    for index in 0..3 {
        let of = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let pieces = chunks.iter().filter(of).filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
        assert_eq!(pieces.collect::<String>(), text(index));
        fits(&answer["choices"][index]["message"]["content"]);
    }
    let object = server.ask(CHAT, &chat(&json!({"response_format": {"type": "json_object"}, "max_tokens": 60})));
    assert!(object["choices"][0]["message"]["content"].as_str().is_some_and(|text| text.starts_with('{')));
    let text = server.ask("/v1/completions", &json!({"prompt": "A", "max_tokens": 200, "response_format": schema}));
    fits(&text["choices"][0]["text"]);

    let refused = |format: Value| {
        server.post(CHAT, &chat(&json!({"response_format": format}))).fails(400, Some("response_format"))
    };
    let unique = json!({"type": "array", "uniqueItems": true});
    let error = refused(json!({"type": "json_schema", "json_schema": {"name": "x", "schema": unique}}));
    assert!(error["message"].as_str().is_some_and(|text| text.contains("uniqueItems")), "{error}");
    server.post(CHAT, &chat(&json!({"response_format": {"type": "xml"}}))).fails(400, Some("response_format.type"));
    server
        .post(CHAT, &chat(&json!({"response_format": {"type": "json_schema"}})))
        .fails(400, Some("response_format.schema"));
}

#[test]
fn tools_are_called_as_their_schemas_say() {
    let server = Server::start(&[]);
    let tools = json!([tool("look"), tool("find")]);
    let one = json!({"type": "function", "function": {"name": "find"}});
    for (choice, parallel) in [(json!("required"), false), (json!("required"), true), (one, true)] {
        for seed in 0..3 {
            let more = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel, "seed": seed});
            let body = chat(&more);
            let answer = server.ask(CHAT, &body);
            let (message, reason) = (&answer["choices"][0]["message"], &answer["choices"][0]["finish_reason"]);
            let calls = message["tool_calls"].as_array().expect("calls");
            if reason == "tool_calls" {
                calls.iter().for_each(|call| fits(&call["function"]["arguments"]));
            } else {
                // Calls may follow each other until the limit.
                assert!(parallel && reason == "length", "{answer}");
            }
            assert!(calls.len() == 1 || (parallel && choice == "required"), "{answer}");
            assert!(choice == "required" || calls[0]["function"]["name"] == "find");
            assert!(
                message["content"].is_null() || message["content"].as_str().is_some_and(|text| text.trim().is_empty())
            );

            // Streamed: the name first, then its arguments in pieces.
            let chunks = server.stream(CHAT, &with(&body, &json!({"stream": true}))).all();
            let mut streamed: Vec<(Value, String)> = Vec::new();
            for call in chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].get(0)) {
                let function = &call["function"];
                match call["id"].is_string() {
                    true => streamed.push((function["name"].clone(), String::new())),
                    false => {
                        streamed.last_mut().expect("a name first").1 += function["arguments"].as_str().expect("text")
                    }
                }
            }
            assert_eq!(streamed.len(), calls.len());
            for (call, (name, arguments)) in calls.iter().zip(&streamed) {
                assert_eq!((&call["function"]["name"], &call["function"]["arguments"]), (name, &json!(arguments)));
            }
        }
    }
    // Without a call in sight, it is text; and none is made where none may be.
    for choice in ["auto", "none"] {
        let answer = server.ask(CHAT, &chat(&json!({"tools": tools, "tool_choice": choice, "max_tokens": 30})));
        assert!(answer["choices"][0]["message"]["content"].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
    }
    for (more, param) in [
        (json!({"tools": [tool("look"), tool("look")]}), "tools[1]"),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0]"),
        (json!({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "other"}}}), "tool_choice"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": tools, "tool_choice": "perhaps"}), "tool_choice"),
    ] {
        server.post(CHAT, &chat(&more)).fails(400, Some(param));
    }
    let bad = json!([{"type": "function", "function": {"name": "x", "parameters": {"type": "object", "not": {}}}}]);
    server.post(CHAT, &chat(&json!({"tools": bad}))).fails(400, Some("tools"));
}

/// What was made is read again as it was: so what was forced of it is known, and what the model chose as far as a tokenizer would, too.
#[test]
fn a_call_that_is_sent_back_is_known() {
    let server = Server::start(&[]);
    let more = json!({"tools": [tool("look")], "tool_choice": "required", "parallel_tool_calls": false});
    let answer = server.ask(CHAT, &chat(&more));
    let message = &answer["choices"][0]["message"];
    let result = json!({"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "It is warm."});
    let messages = json!([ask()[0], message, result]);
    let onward = json!({"messages": messages, "tools": [tool("look")], "max_tokens": 5});
    let cached =
        server.ask(CHAT, &onward)["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
    let made = |name: &str| answer["usage"][name].as_u64().expect("a number");
    assert!(cached > made("prompt_tokens"));
}

/// A template that knows tools tells of them itself, and calls are read again as they were made there, too.
#[test]
fn a_template_with_a_place_for_tools_has_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let from = crate::common::repo("models/tiny/checkpoint");
    for entry in std::fs::read_dir(&from).expect("a folder") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, folder.path().join(path.file_name().expect("a name"))).expect("copied");
    }
    let template = "{% if tools %}{{ '<|im_start|>system\\nYours:' }}{% for tool in tools %}{{ ' ' + tool.function.name }}{% endfor %}\
        {{ '<|im_end|>\\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ m.content }}\
        {% for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' }}{{ call.function | tojson }}{{ '\\n</tool_call>' }}{% endfor %}\
        {{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let path = folder.path().join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    config["chat_template"] = template.into();
    std::fs::write(&path, config.to_string()).expect("written");
    let model = crate::common::converted(folder.path(), st_convert::WeightType::Q4_0, st_convert::Layout::Gguf);
    let mut command = crate::program::program();
    command.args(["serve", crate::program::arg(&model), "--port", "0"]);
    let server = Server::of(&mut command);

    let body = chat(&json!({"tools": [tool("look")], "tool_choice": "required", "parallel_tool_calls": false}));
    let rendered = server.ask("/apply-template", &json!({"messages": ask(), "tools": [tool("look")]}));
    let told = rendered["prompt"].as_str().expect("text");
    assert!(told.starts_with("<|im_start|>system\nYours: look<|im_end|>\n") && !told.contains("# Tools"), "{told}");
    let answer = server.ask(CHAT, &body);
    let message = &answer["choices"][0]["message"];
    let call = &message["tool_calls"][0];
    fits(&call["function"]["arguments"]);
    let result = json!({"role": "tool", "tool_call_id": call["id"], "content": "It is warm."});
    let messages = json!([ask()[0], message, result]);
    let rendered = server.ask("/apply-template", &json!({"messages": messages, "tools": [tool("look")]}));
    let again = rendered["prompt"].as_str().expect("text");
    let arguments = call["function"]["arguments"].as_str().expect("text");
    let made = format!(
        "<tool_call>\n{{\"name\": \"look\", \"arguments\": {arguments}}}\n</tool_call><|im_end|>\n<|im_start|>tool\n"
    );
    assert!(again.strip_prefix(told).is_some_and(|rest| rest.starts_with(&made)), "{again}");
    let onward = server.ask(CHAT, &json!({"messages": messages, "tools": [tool("look")], "max_tokens": 5}));
    let known = onward["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
    assert!(known > answer["usage"]["prompt_tokens"].as_u64().expect("a number"), "{onward}");
}

#[test]
fn responses_are_made_of_items() {
    let server = Server::start(&[]);
    let body =
        json!({"model": "tiny", "input": "Hello.", "instructions": "Be kind.", "max_output_tokens": 12, "seed": 5});
    let answer = server.ask(RESPONSES, &body);
    assert_eq!((&answer["object"], &answer["status"]), (&json!("response"), &json!("incomplete")));
    assert_eq!(answer["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(answer["usage"]["output_tokens"], 12);
    let text = answer["output"][0]["content"][0]["text"].as_str().expect("text");
    // It is what a chat says.
    let messages = json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."}]);
    let chat = server.ask(CHAT, &json!({"messages": messages, "max_tokens": 12, "seed": 5}));
    assert_eq!(chat["choices"][0]["message"]["content"], text);

    let told = events(&server, RESPONSES, &body);
    assert!(told.iter().enumerate().all(|(i, (_, event))| event["sequence_number"] == i), "{told:?}");
    let deltas = told.iter().filter(|(name, _)| name == "response.output_text.delta");
    assert_eq!(deltas.filter_map(|(_, event)| event["delta"].as_str()).collect::<String>(), text);
    let names: Vec<&str> =
        told.iter().map(|(name, _)| name.as_str()).filter(|name| !name.ends_with(".delta")).collect();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ];
    assert_eq!(names, expected);

    let look = json!({"type": "function", "name": "look", "parameters": weather(), "strict": true});
    let other = json!({"type": "web_search"});
    let more = json!({"tools": [other, look], "tool_choice": "required", "parallel_tool_calls": false, "max_output_tokens": 400});
    let called = server.ask(RESPONSES, &with(&body, &more));
    let call = &called["output"][0];
    assert_eq!(
        (&call["type"], &call["name"], &called["status"]),
        (&json!("function_call"), &json!("look"), &json!("completed"))
    );
    fits(&call["arguments"]);
    let told = events(&server, RESPONSES, &with(&body, &more));
    let (last, done) = (told.last().expect("an event"), told.iter().find(|(name, _)| name.ends_with("arguments.done")));
    assert_eq!(
        (last.0.as_str(), &last.1["response"]["output"][0]["arguments"]),
        ("response.completed", &call["arguments"])
    );
    assert_eq!(done.expect("an event").1["arguments"], call["arguments"]);
    let result = json!({"type": "function_call_output", "call_id": call["call_id"], "output": "Warm."});
    let items = json!([{"role": "user", "content": [{"type": "input_text", "text": "Hello."}]}, {"type": "reasoning", "summary": []}, call, result]);
    let onward = server
        .ask(RESPONSES, &json!({"input": items, "instructions": "Be kind.", "tools": [look], "max_output_tokens": 4}));
    let known = onward["usage"]["input_tokens_details"]["cached_tokens"].as_u64();
    assert!(known > called["usage"]["input_tokens"].as_u64(), "{onward}");

    let format = json!({"format": {"type": "json_schema", "name": "w", "schema": weather()}});
    let formed = server.ask(RESPONSES, &with(&body, &json!({"text": format, "max_output_tokens": 300})));
    fits(&formed["output"][0]["content"][0]["text"]);
    for (more, param) in [
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type"),
        (json!({"input": 7}), "input"),
        (json!({"input": []}), "input"),
    ] {
        server.post(RESPONSES, &with(&body, &more)).fails(400, Some(param));
    }
}

#[test]
fn messages_are_made_of_blocks() {
    let server = Server::start(&[]);
    let system =
        json!([{"type": "text", "text": "x-anthropic-billing-header: 17"}, {"type": "text", "text": "Be kind."}]);
    let body = json!({"model": "tiny", "max_tokens": 4, "system": system, "messages": ask(), "seed": 5});
    let answer = server.ask(MESSAGES, &body);
    assert_eq!((&answer["type"], &answer["stop_reason"]), (&json!("message"), &json!("max_tokens")));
    let text = answer["content"][0]["text"].as_str().expect("text");
    let number = |value: &Value| value.as_u64().expect("a number");
    let usage = &answer["usage"];
    let counted = server.ask("/v1/messages/count_tokens", &json!({"system": system, "messages": ask()}));
    let input = number(&usage["input_tokens"]) + number(&usage["cache_read_input_tokens"]);
    assert_eq!((number(&counted["input_tokens"]), number(&usage["output_tokens"])), (input, 4));
    let told = events(&server, MESSAGES, &body);
    let deltas = told.iter().filter_map(|(_, event)| event["delta"]["text"].as_str());
    assert_eq!(deltas.collect::<String>(), text);
    let names: Vec<&str> =
        told.iter().map(|(name, _)| name.as_str()).filter(|name| *name != "content_block_delta").collect();
    let expected =
        ["message_start", "ping", "content_block_start", "content_block_stop", "message_delta", "message_stop"];
    assert_eq!(names, expected);

    let look = json!({"name": "look", "description": "Looks.", "input_schema": weather()});
    let more =
        json!({"tools": [look], "tool_choice": {"type": "any", "disable_parallel_tool_use": true}, "max_tokens": 400});
    let called = server.ask(MESSAGES, &with(&body, &more));
    let call = &called["content"][0];
    assert_eq!((&call["type"], &called["stop_reason"]), (&json!("tool_use"), &json!("tool_use")));
    fits(&call["input"]);
    let told = events(&server, MESSAGES, &with(&body, &more));
    let pieces: String = told.iter().filter_map(|(_, event)| event["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&pieces).expect("JSON"), call["input"]);
    let results =
        json!([{"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "Warm."}]}]);
    let messages =
        json!([ask()[0], {"role": "assistant", "content": called["content"]}, {"role": "user", "content": results}]);
    let onward =
        server.ask(MESSAGES, &json!({"messages": messages, "system": system, "tools": [look], "max_tokens": 4}));
    assert!(number(&onward["usage"]["cache_read_input_tokens"]) > number(&called["usage"]["input_tokens"]), "{onward}");

    for (more, status) in [
        (json!({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}), 400),
        (json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}), 400),
        (json!({"max_tokens": null}), 400),
        (json!({"model": "other"}), 404),
        (json!({"tools": [look], "tool_choice": {"type": "tool", "name": "other"}}), 400),
    ] {
        let answer = server.post(MESSAGES, &with(&body, &more));
        let error = answer.json();
        assert_eq!((answer.status, &error["type"]), (status, &json!("error")), "{error}");
        assert!(error["error"]["type"].is_string() && error["error"]["message"].is_string());
    }
}

#[test]
fn the_page_and_what_it_shows() {
    let server = Server::start(&["--api-key", "sesame"]);
    // The page itself asks for the key.
    let page = server.get("/");
    assert_eq!(page.status, 200);
    assert!(
        page.headers.contains("content-security-policy: default-src 'none'; connect-src 'self'"),
        "{}",
        page.headers
    );
    assert!(page.text().starts_with("<!doctype html>"));
    assert_eq!(server.get("/experts").status, 401);
    drop(server);

    let server = Server::start(&[]);
    let mut stream = server.stream_of("GET", "/experts");
    server.ask(CHAT, &chat(&json!({"max_tokens": 20})));
    let mut used = 0;
    for _ in 0..40 {
        let event = stream.next().expect("an event");
        let event: Value = serde_json::from_str(event.strip_prefix("data: ").expect("data")).expect("JSON");
        let cells = event["layers"].as_u64().expect("a number") * event["experts"].as_u64().expect("a number");
        let pairs = event["used"].as_array().expect("a list");
        assert!(pairs.iter().all(|pair| pair[0].as_u64().is_some_and(|cell| cell < cells)));
        used += pairs.iter().filter_map(|pair| pair[1].as_u64()).sum::<u64>();
        if event["made"].as_u64() > Some(0) && used > 0 {
            return;
        }
    }
    panic!("{used} uses were told of");
}
