//! `/openapi.json` says what the server does: every address is there, every example is answered as it says.

use serde_json::{Value, json};

use crate::http::Server;

/// A part of the page that another refers to.
fn resolve<'a>(page: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(reference) => page.pointer(reference.trim_start_matches('#')).expect("what is referred to"),
        None => schema,
    }
}

/// Whether a value is of a type by its name.
fn is_of(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("the type {other}"),
    }
}

/// Checks a value against a schema, as far as the page uses schemas.
fn check(page: &Value, schema: &Value, value: &Value, place: &str) {
    let schema = resolve(page, schema);
    if let Some(choices) = schema["oneOf"].as_array() {
        let fits = |choice: &Value| choice["type"].as_str().is_some_and(|name| is_of(name, value));
        assert!(choices.iter().any(fits), "{place}: {value}");
        return;
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        other => panic!("{place}: the type {other}"),
    };
    assert!(types.iter().any(|name| is_of(name, value)), "{place}: {value} is not {types:?}");
    if let Some(values) = schema["enum"].as_array() {
        assert!(values.contains(value), "{place}: {value}");
    }
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let object = value.as_object();
        assert!(object.is_none_or(|object| object.contains_key(name)), "{place} lacks {name}: {value}");
    }
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(value) = value.get(name) {
            check(page, schema, value, &format!("{place}.{name}"));
        }
    }
    for item in value.as_array().into_iter().flatten().filter(|_| schema["items"].is_object()) {
        check(page, &schema["items"], item, &format!("{place}[]"));
    }
}

/// Whether an error is about that field: it says so in a field of its own, or where its form has none, in words.
fn names(error: &Value, field: &str) -> bool {
    match error["error"]["param"].as_str() {
        Some(param) => param.starts_with(field),
        None => error["error"]["message"].as_str().is_some_and(|text| text.starts_with(&format!("`{field}"))),
    }
}

#[test]
fn the_description_is_true() {
    let server = Server::start(&[]);
    let page = server.get("/openapi.json").json();
    for (path, operations) in page["paths"].as_object().expect("paths") {
        for (method, operation) in operations.as_object().expect("operations") {
            let address = path.replace("{id}", "tiny");
            let example = &operation["requestBody"]["content"]["application/json"]["example"];
            let events = &operation["responses"]["200"]["content"]["text/event-stream"]["schema"];
            if method == "get" && events.is_object() {
                let event = server.stream_of("GET", &address).next().expect("an event");
                let data = event.strip_prefix("data: ").and_then(|data| serde_json::from_str(data).ok());
                check(&page, events, &data.expect("JSON"), path);
                continue;
            }
            let answer = match method.as_str() {
                "get" => server.get(&address),
                _ => server.post(&address, example),
            };
            let responses = &operation["responses"];
            assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
            match &responses["200"]["content"]["application/json"]["schema"] {
                Value::Null => {
                    let kinds = responses["200"]["content"].as_object().expect("kinds of content");
                    assert!(
                        kinds.keys().all(|kind| answer.headers.contains(kind.as_str())),
                        "{path}: {}",
                        answer.headers
                    );
                }
                schema => check(&page, schema, &answer.json(), path),
            }
            if method == "get" {
                continue;
            }
            // The example is what the request's own schema allows.
            let request = &operation["requestBody"]["content"]["application/json"]["schema"];
            check(&page, request, example, path);
            // What is missing, of another type or beyond a limit is said to be, in the form that errors have.
            let error = &responses["400"]["content"]["application/json"]["schema"];
            let schema = resolve(&page, request);
            for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                let mut less = example.clone();
                less.as_object_mut().expect("an object").remove(name);
                let refused = server.post(&address, &less);
                assert!(refused.status == 400 && names(&refused.json(), name), "{path}: {name}: {}", refused.text());
                check(&page, error, &refused.json(), path);
            }
            for (name, field) in schema["properties"].as_object().expect("properties") {
                let mut wrong = vec![json!({"no": "such"})];
                wrong.extend(field["minimum"].as_f64().map(|least| json!(least - 1.0)));
                wrong.extend(field["maximum"].as_f64().map(|most| json!(most + 1.0)));
                for wrong in wrong.into_iter().filter(|wrong| !(field["type"] == "object" && wrong.is_object())) {
                    let mut body = example.clone();
                    body[name] = wrong.clone();
                    let refused = server.post(&address, &body);
                    assert_eq!(refused.status, 400, "{path}: {name} = {wrong}: {}", refused.text());
                    assert!(names(&refused.json(), name), "{name}: {}", refused.text());
                }
            }
            // A stream where one is promised.
            if responses["200"]["content"]["text/event-stream"].is_object() {
                let mut body = example.clone();
                body["stream"] = json!(true);
                let told = responses["200"]["content"]["text/event-stream"]["schema"]["description"].as_str();
                let mut stream = server.stream(&address, &body);
                match told.is_some_and(|told| told.contains("[DONE]")) {
                    true => assert!(!stream.all().is_empty()),
                    false => {
                        let events: Vec<String> = std::iter::from_fn(|| stream.next()).collect();
                        assert!(events.iter().any(|event| event.starts_with("event: ")), "{path}: {events:?}");
                    }
                }
            }
        }
    }
    for address in ["/", "/experts", "/metrics", "/v1/chat/completions"] {
        assert!(page["paths"][address].is_object(), "{address}");
    }
    let other = server.post("/v1/nothing", &json!({}));
    check(&page, &page["components"]["schemas"]["Error"], &other.json(), "404");
}
