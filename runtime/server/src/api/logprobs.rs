//! How likely tokens were, in the two forms that OpenAI's APIs have for it.

use serde_json::{Map, Value, json};
use st_model::tokenizer::Tokenizer;

use crate::job::Token;

/// The form of chats: a list of objects.
pub(crate) fn of_chat(tokenizer: &Tokenizer, tokens: &[Token]) -> Value {
    let one = |id: u32, logprob: f32| {
        let bytes = tokenizer.visible_bytes(id);
        json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes})
    };
    let content = tokens.iter().map(|token| {
        let mut object = one(token.id, token.logprobs.chosen);
        object["top_logprobs"] = token.logprobs.top.iter().map(|&(id, logprob)| one(id, logprob)).collect();
        object
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// The form of text completions: parallel lists. `offset` is where the tokens' text begins, in characters, and is moved past them.
pub(crate) fn of_text(tokenizer: &Tokenizer, tokens: &[Token], offset: &mut usize) -> Value {
    let text = |id| String::from_utf8_lossy(tokenizer.visible_bytes(id)).into_owned();
    let top = |token: &Token| -> Map<String, Value> {
        token.logprobs.top.iter().map(|&(id, logprob)| (text(id), json!(logprob))).collect()
    };
    let texts: Vec<String> = tokens.iter().map(|token| text(token.id)).collect();
    let offsets: Vec<usize> = texts
        .iter()
        .map(|text| {
            let at = *offset;
            *offset += text.chars().count();
            at
        })
        .collect();
    json!({
        "tokens": texts,
        "token_logprobs": tokens.iter().map(|token| token.logprobs.chosen).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}
