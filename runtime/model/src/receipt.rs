//! Receipts: what is needed to prove an answer, and proving it by making it again.
//!
//! Bits are the same with any instruction set, threads, budget, file layout and company, so a receipt holds none of these: it holds the
//! model by its values ([`ModelDigest`]), the prompt's tokens, every setting, the seed, and for each token of the answer its id and a hash
//! of the logits that it was chosen by. Who has the model makes the answer again and compares. Each part of a receipt has a sum of its
//! own, so that a part that was changed afterwards is named at once; who changes the sum, too, is found out by the answer.

use std::ops::ControlFlow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use st_kernels::KvType;

use crate::answer::{Answer, FinishReason, GenerateOptions};
use crate::constraint::Constraint;
use crate::digest::ModelDigest;
use crate::engine::Engine;
use crate::generate::{GenerateError, Generation, generate_within};
use crate::observer::Observer;
use crate::sampler::{Sampler, SamplerError, SamplerOptions};
use crate::session::Session;

/// The form of receipts that this program writes and reads.
const FORM: u32 = 1;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What proves an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    #[serde(rename = "st_tool_receipt")]
    form: u32,
    /// The version that made it: another may compute other bits.
    pub version: String,
    model: ProvenModel,
    prompt: Vec<u32>,
    /// How tokens were chosen and when the answer was to end.
    pub settings: Settings,
    seed: u64,
    answer: Proven,
    sums: Sums,
}

/// The model of a receipt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProvenModel {
    /// As it was named.
    name: String,
    /// Of all of it.
    sha256: String,
    shape: Vec<(String, String)>,
    /// Name, type and the first 32 bits of the hash of each part.
    tensors: Vec<(String, String, String)>,
}

/// Every setting that an answer depends on, but the seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    repeat_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    logit_bias: Vec<(u32, f32)>,
    max_tokens: Option<usize>,
    stop: Vec<String>,
    /// Tokens that end an answer.
    end_ids: Vec<u32>,
    /// How keys and values were kept.
    kv_type: String,
    /// What the answer had to fit, as whoever made the constraint writes it.
    pub fit: Option<Value>,
}

/// An answer as a receipt has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proven {
    /// The tokens.
    pub ids: Vec<u32>,
    /// In hexadecimal, the hash of the logits that each was chosen by.
    pub logits: Vec<Option<String>>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Its text; empty where the model has no tokenizer.
    pub text: String,
}

/// The first 64 bits of the SHA-256 of each part's JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sums {
    model: String,
    prompt: String,
    settings: String,
    seed: String,
    answer: String,
}

/// Why a text is no receipt that can be proven.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiptError {
    /// It has not the form of one.
    #[error("it is no receipt")]
    Form(#[from] serde_json::Error),
    /// It is of a form that is not known.
    #[error("it is a receipt of form {0}, and only {FORM} is known")]
    Version(u32),
    /// A part of it is not what was written.
    #[error("its {part} was changed after the receipt was made: it does not match its checksum")]
    Changed {
        /// Which.
        part: &'static str,
    },
    /// Parts that do not go together, or a value that none has.
    #[error("it is no receipt: {0}")]
    Malformed(&'static str),
}

/// The first thing that is not as a receipt has it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// Logits of a token.
    #[error(
        "token {} is not proven: the logits that it was chosen by are others here; {}", index + 1,
        if *index == 0 { "the prompt, or what computes, is another" } else { "the tokens before it are the same" }
    )]
    Logits {
        /// Which token, from 0.
        index: usize,
    },
    /// A token that follows from the same logits.
    #[error("token {} is not the same: it is {receipt} in the receipt, and {here} by the same logits, settings and seed", index + 1)]
    Token {
        /// Which, from 0.
        index: usize,
        /// The receipt's.
        receipt: u32,
        /// What it is.
        here: u32,
    },
    /// Where the answer ends, or why.
    #[error("the answer ends otherwise: after {receipt} tokens ({}) in the receipt, after {here} ({}) here", name(*why), name(*why_here))]
    End {
        /// Tokens of the receipt's.
        receipt: usize,
        /// Why it ended.
        why: FinishReason,
        /// Tokens of this one.
        here: usize,
        /// Why it ended.
        why_here: FinishReason,
    },
    /// The text of the same tokens.
    #[error("the text is not that of the tokens, which are the same")]
    Text,
}

fn name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "its end",
        FinishReason::Length => "the limit",
        FinishReason::Cancelled => "stopped",
        FinishReason::Error => "an error",
    }
}

impl Settings {
    /// The settings of an answer that `sampler` and `options` made.
    pub fn of(engine: &Engine, sampler: &Sampler, options: &GenerateOptions, fit: Option<Value>) -> Self {
        let o = sampler.options();
        Self {
            temperature: o.temperature,
            top_k: o.top_k,
            top_p: o.top_p,
            min_p: o.min_p,
            repeat_penalty: o.repeat_penalty,
            frequency_penalty: o.frequency_penalty,
            presence_penalty: o.presence_penalty,
            logit_bias: sampler.bias().to_vec(),
            max_tokens: options.max_tokens,
            stop: options.stop.clone(),
            end_ids: engine.end_ids().to_vec(),
            kv_type: kv_name(engine.kv_type()).to_owned(),
            fit,
        }
    }

    /// How keys and values have to be kept.
    ///
    /// # Errors
    /// Where there is no such way.
    pub fn kv_type(&self) -> Result<KvType, ReceiptError> {
        let known = [KvType::Bf16, KvType::F16, KvType::Q8_0, KvType::F32];
        let found = known.into_iter().find(|&ty| kv_name(ty) == self.kv_type);
        found.ok_or(ReceiptError::Malformed("its way to keep keys and values is not known"))
    }
}

fn kv_name(ty: KvType) -> &'static str {
    match ty {
        KvType::Bf16 => "bf16",
        KvType::F16 => "f16",
        KvType::Q8_0 => "q8_0",
        KvType::F32 => "f32",
    }
}

impl ProvenModel {
    fn new(name: &str, digest: &ModelDigest) -> Self {
        Self {
            name: name.to_owned(),
            sha256: hex(&digest.sha256()),
            shape: digest.shape.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
            tensors: digest
                .tensors
                .iter()
                .map(|tensor| {
                    let parts = tensor.parts.iter().map(|part| hex(&part[..4])).collect();
                    (tensor.name.clone(), tensor.ty.to_owned(), parts)
                })
                .collect(),
        }
    }

    /// What of `here` is not as in `self`, which is another model, in words.
    fn difference(&self, here: &Self) -> String {
        let shape = self.shape.iter().zip(&here.shape).find(|(a, b)| a != b);
        if let Some(((name, value), (_, is))) = shape {
            return format!("{name} is {is}, and {value} in the receipt");
        }
        for (name, ty, parts) in &self.tensors {
            let Some((_, ty_here, parts_here)) = here.tensors.iter().find(|(other, ..)| other == name) else {
                return format!("{name} is missing");
            };
            if ty != ty_here {
                return format!("{name} is of type {ty_here}, and {ty} in the receipt");
            }
            let part = |at: usize, of: &str| of.get(8 * at..8 * at + 8).map(str::to_owned);
            let n = parts_here.len() / 8;
            if let Some(at) = (0..n.max(parts.len() / 8)).find(|&at| part(at, parts) != part(at, parts_here)) {
                let of_expert = if n > 1 { format!(" of expert {at}") } else { String::new() };
                return format!("a weight in {name}{of_expert} is another");
            }
        }
        match here.tensors.iter().find(|(name, ..)| self.tensors.iter().all(|(other, ..)| other != name)) {
            Some((name, ..)) => format!("{name} is not in the receipt"),
            None => "a weight is another".to_owned(),
        }
    }
}

impl Receipt {
    /// The receipt of `answer`, which a model called `name` made after the tokens `prompt`, the hashes of its logits included
    /// ([`GenerateOptions::hash_logits`]).
    pub fn new(
        name: &str,
        digest: &ModelDigest,
        prompt: &[u32],
        settings: Settings,
        seed: u64,
        answer: Proven,
    ) -> Self {
        let none = || String::new();
        let sums = Sums { model: none(), prompt: none(), settings: none(), seed: none(), answer: none() };
        let mut receipt = Self {
            form: FORM,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model: ProvenModel::new(name, digest),
            prompt: prompt.to_vec(),
            settings,
            seed,
            answer,
            sums,
        };
        receipt.sums = receipt.summed();
        receipt
    }

    /// Reads a receipt, and finds out which part of it was changed after it was written.
    ///
    /// # Errors
    /// [`ReceiptError`].
    pub fn parse(text: &str) -> Result<Self, ReceiptError> {
        #[derive(Deserialize)]
        struct Any {
            st_tool_receipt: u32,
        }
        let any: Any = serde_json::from_str(text)?;
        if any.st_tool_receipt != FORM {
            return Err(ReceiptError::Version(any.st_tool_receipt));
        }
        let receipt: Self = serde_json::from_str(text)?;
        let (stated, sums) = (&receipt.sums, receipt.summed());
        for (part, stated, sum) in [
            ("model", &stated.model, sums.model),
            ("prompt", &stated.prompt, sums.prompt),
            ("settings", &stated.settings, sums.settings),
            ("seed", &stated.seed, sums.seed),
            ("answer", &stated.answer, sums.answer),
        ] {
            if *stated != sum {
                return Err(ReceiptError::Changed { part });
            }
        }
        if receipt.prompt.is_empty() {
            return Err(ReceiptError::Malformed("its prompt is empty"));
        }
        if receipt.answer.ids.len() != receipt.answer.logits.len() {
            return Err(ReceiptError::Malformed("it has not a hash of logits for each token"));
        }
        receipt.settings.kv_type()?;
        Ok(receipt)
    }

    /// The receipt as a line of JSON.
    ///
    /// # Errors
    /// None that a receipt of this crate has.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string(self)? + "\n")
    }

    fn summed(&self) -> Sums {
        fn sum(part: &impl Serialize) -> String {
            // What is read from JSON, or made here, can be written.
            let json = serde_json::to_vec(part).unwrap_or_default();
            hex(&Sha256::digest(json)[..8])
        }
        Sums {
            model: sum(&self.model),
            prompt: sum(&self.prompt),
            settings: sum(&self.settings),
            seed: sum(&self.seed),
            answer: sum(&self.answer),
        }
    }

    /// What the model was called.
    pub fn model_name(&self) -> &str {
        &self.model.name
    }

    /// The SHA-256 of the model, in hexadecimal.
    pub fn model_sha256(&self) -> &str {
        &self.model.sha256
    }

    /// The answer.
    pub fn answer(&self) -> &Proven {
        &self.answer
    }

    /// Tokens of prompt and answer: the context that proving it takes.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.answer.ids.len()
    }

    /// What of a model is not as in the receipt, in words; `None` where it is the same.
    pub fn other_model(&self, digest: &ModelDigest) -> Option<String> {
        let here = ProvenModel::new("", digest);
        (here.sha256 != self.model.sha256).then(|| self.model.difference(&here))
    }

    /// What of the tokens that end an answer is not as in the receipt, in words.
    pub fn other_end(&self, engine: &Engine) -> Option<String> {
        let ends = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let (there, here) = (&self.settings.end_ids, engine.end_ids());
        (there != here).then(|| format!("answers end with token {} there, with {} here", ends(there), ends(here)))
    }

    /// The sampler that chose the tokens.
    ///
    /// # Errors
    /// Where a setting is outside its range.
    pub fn sampler(&self) -> Result<Sampler, SamplerError> {
        let s = &self.settings;
        let options = SamplerOptions {
            temperature: s.temperature,
            top_k: s.top_k,
            top_p: s.top_p,
            min_p: s.min_p,
            repeat_penalty: s.repeat_penalty,
            frequency_penalty: s.frequency_penalty,
            presence_penalty: s.presence_penalty,
            seed: self.seed,
        };
        Sampler::new(options)?.with_bias(s.logit_bias.clone())
    }

    /// Makes the answer again, with a constraint made of [`Settings::fit`], and compares. `observer` follows and may stop the prompt,
    /// `on_token` is called for each token and may stop the answer.
    ///
    /// # Errors
    /// What making the answer meets; [`ModelError::Cancelled`](crate::ModelError::Cancelled) where it is stopped.
    pub fn again(
        &self,
        engine: &Arc<Engine>,
        constraint: Option<Box<dyn Constraint>>,
        observer: &mut dyn Observer,
        on_token: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Difference>, GenerateError> {
        let mut session = Session::new(engine)?;
        let mut sampler = self.sampler().map_err(crate::ModelError::from)?;
        let made = self.answer.ids.len();
        // One that ended by itself has to do so again; any other goes as far as the receipt's.
        let most = if self.answer.finish_reason == FinishReason::Stop { made + 1 } else { made };
        let max_tokens = Some(self.settings.max_tokens.map_or(most, |limit| limit.min(most)));
        let options = GenerateOptions { max_tokens, stop: self.settings.stop.clone(), hash_logits: true };
        let go_on = &mut |_: &str| on_token();
        let again = generate_within(&mut session, &self.prompt, &mut sampler, &options, constraint, observer, go_on)?;
        if again.finish_reason == FinishReason::Cancelled {
            return Err(crate::ModelError::Cancelled.into());
        }
        Ok(self.difference(&Proven::from(&again), engine.tokenizer().is_some()))
    }

    fn difference(&self, here: &Proven, has_text: bool) -> Option<Difference> {
        let there = &self.answer;
        for index in 0..there.ids.len().min(here.ids.len()) {
            if there.logits[index] != here.logits[index] {
                return Some(Difference::Logits { index });
            }
            let [receipt, here] = [there.ids[index], here.ids[index]];
            if receipt != here {
                return Some(Difference::Token { index, receipt, here });
            }
        }
        let (receipt, why) = (there.ids.len(), there.finish_reason);
        let ends = |reason| if reason == FinishReason::Stop { FinishReason::Stop } else { FinishReason::Length };
        if receipt != here.ids.len() || ends(why) != ends(here.finish_reason) {
            return Some(Difference::End { receipt, why, here: here.ids.len(), why_here: here.finish_reason });
        }
        (has_text && there.text != here.text).then_some(Difference::Text)
    }
}

impl From<&Answer> for Proven {
    fn from(answer: &Answer) -> Self {
        Self {
            ids: answer.ids().to_vec(),
            logits: answer.logits_hashes().iter().map(|hash| hash.map(|hash| hex(&hash))).collect(),
            finish_reason: answer.finish_reason().unwrap_or(FinishReason::Length),
            text: answer.text().to_owned(),
        }
    }
}

impl From<&Generation> for Proven {
    fn from(answer: &Generation) -> Self {
        Self {
            ids: answer.ids.clone(),
            logits: answer.logits.iter().map(|hash| hash.map(|hash| hex(&hash))).collect(),
            finish_reason: answer.finish_reason,
            text: answer.text.clone(),
        }
    }
}
