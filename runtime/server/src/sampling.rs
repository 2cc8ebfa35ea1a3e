//! How an answer is to be made, as requests of several APIs say it: the fields that they have in common.

use serde_json::{Value, json};
use st_model::sampler::{Sampler, SamplerOptions};
use st_model::{Engine, GenerateOptions};

use crate::app::App;
use crate::clock::random;
use crate::error::ApiError;
use crate::fields::{Fields, is_nothing, is_number};
use crate::job::Job;

/// Stop strings, their bytes, biased tokens, likely tokens told of and answers to one prompt, at most.
const STOPS: usize = 16;
const STOP_BYTES: usize = 1024;
const BIASES: usize = 4096;
const TOP_LOGPROBS: i64 = 20;
const ANSWERS: i64 = 32;

/// How the answers of a request are made.
#[derive(Clone, Debug)]
pub(crate) struct Sampling {
    pub(crate) options: SamplerOptions,
    pub(crate) bias: Vec<(u32, f32)>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) stop: Vec<String>,
    /// Answers to each prompt.
    pub(crate) n: usize,
    pub(crate) logprobs: Option<usize>,
    /// Whether answers are to be proven.
    pub(crate) receipt: bool,
}

impl Sampling {
    /// Takes what is said of sampling from the fields of a request for a model with `n_vocab` tokens. `max_tokens` are the names of
    /// that limit, the strongest first.
    ///
    /// # Errors
    /// What is out of range, and what would change the answer and is not supported.
    pub(crate) fn take(fields: &mut Fields, max_tokens: &[&str], n_vocab: usize) -> Result<Self, ApiError> {
        let d = SamplerOptions::default();
        let options = SamplerOptions {
            temperature: fields.number("temperature", 0.0..=100.0)?.unwrap_or(d.temperature),
            top_k: fields.whole("top_k", -1..=i64::MAX)?.map_or(d.top_k, |k| usize::try_from(k).unwrap_or(0)),
            // 0 leaves the likeliest token alone.
            top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(d.top_p).max(f32::MIN_POSITIVE),
            min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(d.min_p),
            repeat_penalty: repeat_penalty(fields)?.unwrap_or(d.repeat_penalty),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(d.frequency_penalty),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(d.presence_penalty),
            seed: seed(fields)?,
        };
        let mut limit = None;
        for name in max_tokens {
            let said = fields.whole(name, -1..=i64::MAX)?;
            limit = limit.or(said);
        }
        refuse_others(fields)?;
        Ok(Self {
            options,
            bias: bias(fields, n_vocab)?,
            max_tokens: limit.and_then(|limit| usize::try_from(limit).ok()),
            stop: stops(fields, "stop")?,
            n: fields.whole("n", 1..=ANSWERS)?.map_or(1, |n| n as usize),
            logprobs: None,
            receipt: false,
        })
    }

    /// The number of likely tokens told of beside each, where logprobs are wanted.
    pub(crate) fn top_logprobs(fields: &mut Fields, name: &str) -> Result<Option<usize>, ApiError> {
        Ok(fields.whole(name, 0..=TOP_LOGPROBS)?.map(|n| n as usize))
    }

    /// Takes the wish for receipts.
    ///
    /// # Errors
    /// Where this server gives none.
    pub(crate) fn take_receipt(&mut self, fields: &mut Fields, app: &App) -> Result<(), ApiError> {
        self.receipt = fields.flag("receipt")?;
        match (self.receipt, app.settings.receipts.is_some()) {
            (true, false) => {
                Err(ApiError::field("receipt", "this server gives none: it was started without --receipts"))
            }
            _ => Ok(()),
        }
    }

    /// The seed of the `index`-th answer to a prompt.
    pub(crate) fn seed_of(&self, index: usize) -> u64 {
        self.options.seed.wrapping_add(index as u64)
    }

    /// Jobs for the answers to `prompt`, each with a seed of its own.
    ///
    /// # Errors
    /// Where the prompt is empty, or longer than the context, or an option is out of range.
    pub(crate) fn jobs(&self, engine: &Engine, prompt: &[u32], param: &str) -> Result<Vec<Job>, ApiError> {
        let n_vocab = engine.n_vocab();
        if prompt.is_empty() {
            return Err(ApiError::field(param, "it is empty: there is no token to go on from"));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(ApiError::field(param, format!("token {id} is outside the vocabulary of {n_vocab}")));
        }
        // A token at least must have room.
        if prompt.len() > engine.ctx() {
            return Err(too_long(param, prompt.len(), engine.ctx()));
        }
        let job = |index| {
            let options = SamplerOptions { seed: self.seed_of(index), ..self.options };
            let sampler = Sampler::new(options).and_then(|sampler| sampler.with_bias(self.bias.clone()));
            Ok(Job {
                prompt: prompt.to_vec(),
                sampler: sampler.map_err(|error| ApiError::bad(error.to_string()))?,
                limits: GenerateOptions {
                    max_tokens: self.max_tokens,
                    stop: self.stop.clone(),
                    ..GenerateOptions::default()
                },
                logprobs: self.logprobs,
                grammar: None,
                settings: None,
            })
        };
        (0..self.n).map(job).collect()
    }
}

/// The error for a prompt that the context does not hold.
pub(crate) fn too_long(param: &str, needed: usize, ctx: usize) -> ApiError {
    let message = format!("the prompt has {needed} tokens or more, the context holds {ctx}");
    let more = Some(Box::new(("context", json!({"n_prompt_tokens": needed, "n_ctx": ctx}))));
    ApiError { code: "context_length_exceeded", more, ..ApiError::field(param, message) }
}

fn repeat_penalty(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    let names = ["repeat_penalty", "repetition_penalty"];
    let [first, second] = names.map(|name| fields.number(name, 1e-3..=1e3));
    Ok(first?.or(second?))
}

/// The seed; where none is given, one is drawn, short enough to be copied by a person and by JavaScript.
fn seed(fields: &mut Fields) -> Result<u64, ApiError> {
    Ok(match fields.take("seed") {
        None => random() >> 32,
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(seed), _) => seed,
            (None, Some(-1)) => random() >> 32,
            _ => return Err(ApiError::field("seed", "a whole number from 0 is expected, or -1")),
        },
    })
}

/// A list of stop strings, or one.
pub(crate) fn stops(fields: &mut Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let wrong = || ApiError::field(name, format!("up to {STOPS} texts of up to {STOP_BYTES} bytes are expected"));
    let texts = match fields.take(name) {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![Value::String(text)],
        Some(Value::Array(items)) => items,
        Some(_) => return Err(wrong()),
    };
    let text = |value| match value {
        Value::String(text) if text.len() <= STOP_BYTES => Ok(text),
        _ => Err(wrong()),
    };
    let texts = texts.into_iter().map(text).collect::<Result<Vec<String>, _>>()?;
    if texts.len() > STOPS { Err(wrong()) } else { Ok(texts) }
}

fn bias(fields: &mut Fields, n_vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    const NAME: &str = "logit_bias";
    let pairs = match fields.take(NAME) {
        None => return Ok(Vec::new()),
        Some(Value::Object(pairs)) => pairs,
        Some(Value::Array(items)) if items.is_empty() => return Ok(Vec::new()),
        Some(_) => return Err(ApiError::field(NAME, "an object of token ids and numbers is expected")),
    };
    if pairs.len() > BIASES {
        return Err(ApiError::field(NAME, format!("at most {BIASES} tokens are expected")));
    }
    let pair = |(id, by): (String, Value)| {
        let name = format!("{NAME}.{id}");
        let known = id.parse().ok().filter(|&id: &u32| (id as usize) < n_vocab);
        let id = known.ok_or_else(|| ApiError::field(&name, format!("the tokens are 0 to {}", n_vocab - 1)))?;
        let by = by.as_f64().filter(|by| (-100.0..=100.0).contains(by));
        let by = by.ok_or_else(|| ApiError::field(&name, "a number from -100 to 100 is expected"))?;
        Ok((id, by as f32))
    };
    pairs.into_iter().map(pair).collect()
}

/// Refuses what other servers know, changes answers, and is nothing here.
fn refuse_others(fields: &mut Fields) -> Result<(), ApiError> {
    for name in [
        "mirostat",
        "dynatemp_range",
        "dry_multiplier",
        "xtc_probability",
        "min_tokens",
        "ignore_eos",
        "bad_words",
        "stop_token_ids",
        "grammar",
        "json_schema",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "samplers",
        "lora",
        "functions",
        "function_call",
        "audio",
        "web_search_options",
        "chat_template",
        "chat_template_kwargs",
        "suffix",
        "use_beam_search",
    ] {
        fields.refuse(name, is_nothing)?;
    }
    fields.refuse("typical_p", is_number(1.0))?;
    fields.refuse("top_a", is_number(0.0))?;
    fields.refuse("top_n_sigma", |value| value.as_f64().is_some_and(|sigma| sigma <= 0.0))?;
    fields.refuse("best_of", is_number(1.0))?;
    fields.refuse("add_generation_prompt", |value| value.as_bool() == Some(true))?;
    fields.refuse("continue_final_message", is_nothing)?;
    fields.refuse("modalities", |value| *value == json!(["text"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(body: Value) -> Result<Sampling, ApiError> {
        let mut fields = Fields::of(body, "").expect("an object");
        Sampling::take(&mut fields, &["max_completion_tokens", "max_tokens"], 100)
    }

    #[test]
    fn what_is_said_is_taken() {
        let sampling = take(json!({
            "temperature": 0, "top_p": 0, "top_k": -1, "seed": 7, "n": 3, "stop": "x", "max_tokens": 5,
            "max_completion_tokens": 4.0, "logit_bias": {"7": -100}, "user": "me", "presence_penalty": null
        }))
        .expect("valid");
        assert_eq!((sampling.options.temperature, sampling.options.top_k, sampling.options.seed), (0.0, 0, 7));
        assert!(sampling.options.top_p > 0.0 && sampling.options.presence_penalty == 0.0);
        assert_eq!((sampling.n, sampling.max_tokens, sampling.stop.as_slice()), (3, Some(4), &["x".to_owned()][..]));
        assert_eq!((sampling.bias.as_slice(), sampling.seed_of(2)), (&[(7, -100.0)][..], 9));
        let drawn = [take(json!({})).unwrap().options.seed, take(json!({"seed": -1})).unwrap().options.seed];
        assert!(drawn[0] != drawn[1] && drawn[0] < 1 << 32);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({"temperature": -0.1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_p": 1.5}), "top_p"),
            (json!({"seed": 1.5}), "seed"),
            (json!({"seed": -2}), "seed"),
            (json!({"n": 0}), "n"),
            (json!({"max_tokens": "many"}), "max_tokens"),
            (json!({"stop": [1]}), "stop"),
            (json!({"stop": vec!["x"; 17]}), "stop"),
            (json!({"logit_bias": {"100": 1}}), "logit_bias.100"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
            (json!({"mirostat": 2}), "mirostat"),
            (json!({"functions": [{}]}), "functions"),
            (json!({"best_of": 2}), "best_of"),
        ] {
            let error = take(body.clone()).expect_err("refused");
            assert_eq!((error.param.as_deref(), error.status.as_u16()), (Some(param), 400), "{body}");
        }
        assert!(
            take(json!({"mirostat": 0, "functions": [], "best_of": 1, "grammar": "", "modalities": ["text"]})).is_ok()
        );
    }
}
