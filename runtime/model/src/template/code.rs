//! What a template may be, and its compiled form with a weighing after every operation that makes a value.

use std::collections::BTreeMap;

use minijinja::machinery::{CodeGenerator, Instruction, Instructions, Token, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind, Value};

use super::guard::{MULTIPLY, ONE, STORE, TICK, WEIGH};

/// Bytes of a template; the longest published ones have some 30 thousand.
const MAX_SOURCE: usize = 256 << 10;
/// Tokens between `{{` and `}}` or `{%` and `%}`. Parser and code generator go as deep as there are operators in a row.
const MAX_TAG: usize = 4096;
/// `elif` branches, each of which is a level, too.
const MAX_BRANCHES: usize = 1024;

/// Code and blocks of a template.
pub(super) type Compiled<'s> = (Instructions<'s>, BTreeMap<&'s str, Instructions<'s>>);

/// Checks `source` against the limits. What is returned differs in one thing: each factor is multiplied by a variable
/// that is 1, so that products of constants are left to the rendering, which bounds them. The code generator does not.
pub(super) fn admit(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    let refuse = |what: String| Err(Error::new(ErrorKind::SyntaxError, what));
    if source.len() > MAX_SOURCE {
        return refuse(format!("it has {} bytes, more than {MAX_SOURCE}", source.len()));
    }
    let mut out = String::with_capacity(source.len());
    let (mut copied, mut in_tag, mut branches) = (0, 0, 0);
    let mut opens_block = false;
    for token in tokenize(source, false, syntax) {
        let (token, span) = token?;
        in_tag += 1;
        match token {
            Token::VariableStart | Token::BlockStart | Token::TemplateData(_) => in_tag = 0,
            Token::Ident("elif") if opens_block => branches += 1,
            Token::Mul => {
                let end = span.end_offset as usize;
                out.push_str(source.get(copied..end).unwrap_or_default());
                out.push_str(&format!(" {ONE} *"));
                copied = end;
            }
            _ => {}
        }
        if in_tag > MAX_TAG {
            return refuse(format!("one expression has more than {MAX_TAG} parts"));
        }
        if branches > MAX_BRANCHES {
            return refuse(format!("it has more than {MAX_BRANCHES} elif branches"));
        }
        opens_block = matches!(token, Token::BlockStart);
    }
    out.push_str(source.get(copied..).unwrap_or_default());
    Ok(out)
}

/// Compiles a template that was admitted.
pub(super) fn compile<'s>(source: &'s str, name: &'s str, syntax: SyntaxConfig) -> Result<Compiled<'s>, Error> {
    let template = parse(source, name, syntax)?;
    let mut generator = CodeGenerator::new(name, source);
    generator.compile_stmt(&template);
    let (instructions, blocks) = generator.finish();
    let blocks = blocks.into_iter().map(|(block, code)| (block, guarded(&code)));
    Ok((guarded(&instructions), blocks.collect()))
}

/// A filter in the place of an instruction. Names that begin with a control character cannot be written in a template.
fn filter<'s>(name: &'static str, arguments: u16) -> Instruction<'s> {
    // The number stands for no cache of what the name means.
    Instruction::ApplyFilter(name, Some(arguments), u8::MAX)
}

/// The same code with every value weighed that an instruction makes of others, and the clock looked at where one takes time.
fn guarded<'s>(code: &Instructions<'s>) -> Instructions<'s> {
    let mut out = Instructions::new(code.name(), code.source());
    let mut starts = Vec::new();
    let all = (0..).map_while(|at| Some((at, code.get(at)?)));
    for (at, instruction) in all.clone() {
        let line = code.get_line(at).and_then(|line| u16::try_from(line).ok()).unwrap_or_default();
        let mut put = |instruction: Instruction<'s>| out.add_with_line(instruction, line);
        let start = match instruction {
            // Text of the template goes through the formatter, as all output does.
            Instruction::EmitRaw(text) => {
                let start = put(Instruction::LoadConst(Value::from_safe_string((*text).to_owned())));
                put(Instruction::Emit);
                start
            }
            Instruction::Mul => put(filter(MULTIPLY, 2)),
            Instruction::SetAttr(name) => {
                // Value and namespace are looked at together, as a tuple that is taken apart again.
                let start = put(Instruction::BuildTuple(Some(2)));
                put(filter(STORE, 1));
                put(Instruction::UnpackList(2));
                put(Instruction::Swap);
                put(Instruction::SetAttr(name));
                start
            }
            Instruction::Add
            | Instruction::StringConcat
            | Instruction::Slice
            | Instruction::BuildMap(_)
            | Instruction::BuildKwargs(_)
            | Instruction::MergeKwargs(_)
            | Instruction::BuildList(_)
            | Instruction::BuildTuple(_)
            | Instruction::ApplyFilter(..)
            | Instruction::CallFunction(..)
            | Instruction::CallMethod(..)
            | Instruction::CallObject(_)
            | Instruction::ExportLocals
            | Instruction::EndCapture => {
                let start = put(instruction.clone());
                put(filter(WEIGH, 1));
                start
            }
            Instruction::Eq
            | Instruction::Ne
            | Instruction::Gt
            | Instruction::Gte
            | Instruction::Lt
            | Instruction::Lte
            | Instruction::In
            | Instruction::CompareAndPreserve(_)
            | Instruction::GetItem
            | Instruction::PerformTest(..) => {
                let start = put(instruction.clone());
                put(filter(TICK, 1));
                start
            }
            // No other makes a value, or only a number or a truth.
            Instruction::StoreLocal(_)
            | Instruction::Lookup(_)
            | Instruction::GetAttr(_)
            | Instruction::LoadConst(_)
            | Instruction::UnpackList(_)
            | Instruction::UnpackLists(_)
            | Instruction::Sub
            | Instruction::Div
            | Instruction::IntDiv
            | Instruction::Rem
            | Instruction::Pow
            | Instruction::Neg
            | Instruction::Not
            | Instruction::Emit
            | Instruction::PushLoop(_)
            | Instruction::PushWith
            | Instruction::Iterate(_)
            | Instruction::PushDidNotIterate
            | Instruction::PopFrame
            | Instruction::PopLoopFrame
            | Instruction::Jump(_)
            | Instruction::JumpIfFalse(_)
            | Instruction::JumpIfFalseOrPop(_)
            | Instruction::JumpIfTrueOrPop(_)
            | Instruction::PushAutoEscape
            | Instruction::PopAutoEscape
            | Instruction::BeginCapture(_)
            | Instruction::DupTop
            | Instruction::DiscardTop
            | Instruction::FastSuper
            | Instruction::FastRecurse
            | Instruction::Swap
            | Instruction::CallBlock(_)
            | Instruction::LoadBlocks
            | Instruction::Include(_)
            | Instruction::BuildMacro(..)
            | Instruction::Return
            | Instruction::IsUndefined
            | Instruction::Enclose(_)
            | Instruction::GetClosure => put(instruction.clone()),
        };
        starts.push(start);
    }
    let end = starts.last().map_or(0, |&last| (last..).find(|&at| out.get(at).is_none()).unwrap_or(last));
    let moved = |target: u32| starts.get(target as usize).copied().unwrap_or(end);
    for (at, instruction) in all {
        let target = match instruction {
            Instruction::Iterate(target)
            | Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::BuildMacro(_, target, _) => moved(*target),
            _ => continue,
        };
        if let Some(
            Instruction::Iterate(old)
            | Instruction::Jump(old)
            | Instruction::JumpIfFalse(old)
            | Instruction::JumpIfFalseOrPop(old)
            | Instruction::JumpIfTrueOrPop(old)
            | Instruction::BuildMacro(_, old, _),
        ) = out.get_mut(moved(at))
        {
            *old = target;
        }
    }
    out
}
