//! `st-tool quantize`: a checkpoint to a GGUF file, or what that would give.

use std::path::PathBuf;
use std::process::ExitCode;

use st_convert::{
    ConvertOptions, ConvertPlan, Converted, Imatrix, SearchGain, SquaredErrors, WeightType, compare, convert, plan,
};
use st_gguf::{Layout, ModelShape};

use super::{check_converted, predictor, show_differences};
use crate::arriving::{self, Addition};
use crate::cli::QuantizeArgs;
use crate::context::Context;
use crate::get::Wanted;
use crate::models::{Fetch, Model, not_stdin};
use crate::size::show_size;
use crate::ui::{self, ConvertBar};
use st_sys::available_threads;

pub(crate) fn run(args: &QuantizeArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let model = Model::resolve(&args.model)?;
    let options = ConvertOptions {
        ty: args.type_name().into(),
        output_type: args.output_type.map(Into::into),
        layout: args.layout.into(),
        threads: args.threads.0.unwrap_or_else(available_threads),
        search: args.search || args.imatrix.is_some(),
        imatrix: args.imatrix.as_deref().map(Imatrix::open).transpose()?,
        requantize: args.allow_requantize,
        extra: None,
        keep_head: args.keep_head,
    };
    let output = args.output.clone().unwrap_or_else(|| default_output(&model, args));
    let writes = !args.dry_run && args.compare.is_none();
    if writes {
        // Said before anything is downloaded.
        check_converted(&output, args.force, model.path())?;
    }
    let warn = |plan: &ConvertPlan| {
        for warning in &plan.warnings {
            context.ui.note(format_args!("note: {warning}"));
        }
    };
    let tell = |written: &Converted| {
        warn(&written.plan);
        if args.search || args.imatrix.is_some() {
            context.ui.note(gains_table(&written.gains).trim_end());
        }
        context.ui.note(format_args!("{}: {}", output.display(), show_size(written.plan.output_bytes)));
    };
    let with_predictor = |shape: &ModelShape| -> anyhow::Result<ConvertOptions> {
        let extra = args.predictor.as_ref().map(|path| predictor::tensor(path, shape)).transpose()?;
        Ok(ConvertOptions { extra, ..options.clone() })
    };
    if let (Model::Hub(Wanted { repo, ty: None }), true) = (&model, writes) {
        let mark = args.predictor.as_ref().map(|path| predictor::mark(path)).transpose()?;
        let addition = mark.map(|mark| Addition { mark, add: &with_predictor });
        tell(&arriving::convert(repo, &options, &output, args.force, args.keep, addition.as_ref(), context)?);
        return Ok(ExitCode::SUCCESS);
    }
    let fetch = if args.dry_run { Fetch::Never } else { Fetch::Allowed };
    let input = model.open_source(context, fetch)?;
    let options = with_predictor(input.shape())?;
    if args.dry_run {
        let plan = plan(&input, &options)?;
        warn(&plan);
        ui::print(&table(&plan))?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(with) = &args.compare {
        not_stdin(with)?;
        let bar = ConvertBar::new(context.ui, "comparing");
        let differences = compare(&input, &options, with, &bar, context.interrupt.cancel())?;
        drop(bar);
        return show_differences(with, &differences, context);
    }
    let bar = ConvertBar::new(context.ui, "converting");
    let written = convert(&input, &options, &output, args.force, &bar, context.interrupt.cancel())?;
    drop(bar);
    tell(&written);
    Ok(ExitCode::SUCCESS)
}

fn default_output(model: &Model, args: &QuantizeArgs) -> PathBuf {
    let ty = type_suffix(args);
    let layout = match Layout::from(args.layout) {
        Layout::Gguf => "",
        Layout::Offload => "-offload",
    };
    PathBuf::from(format!("{}-{ty}{layout}.gguf", model.file_stem()))
}

/// How names of files say the type.
fn type_suffix(args: &QuantizeArgs) -> String {
    WeightType::from(args.type_name()).name().to_lowercase()
}

/// Name, type, shape and size of every tensor, then the size of the file.
pub(crate) fn table(plan: &ConvertPlan) -> String {
    let width = plan.tensors.iter().map(|tensor| tensor.spec.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for tensor in &plan.tensors {
        let shape: Vec<String> = tensor.spec.shape.iter().map(u64::to_string).collect();
        out.push_str(&format!(
            "{:width$}  {:5}  {:>20}  {:>10}\n",
            tensor.spec.name,
            tensor.spec.ty.name(),
            shape.join(" x "),
            show_size(tensor.bytes)
        ));
    }
    out.push_str(&format!("{} tensors, {} in the file\n", plan.tensors.len(), show_size(plan.output_bytes)));
    out
}

/// Mean squared error of the weights with the reference's scales and with those found, per kind of matrix and over all.
fn gains_table(gains: &[SearchGain]) -> String {
    let mut out = format!("{:14}  {:>9}  {:>9}  mean squared error\n", "", "default", "--search");
    let (mut weights, mut errors) = (0, SquaredErrors::default());
    let mut row = |name: &str, weights: u64, errors: SquaredErrors| {
        let mean = |sum: f64| sum / weights.max(1) as f64;
        let change = if errors.reference > 0.0 { 100.0 * (errors.chosen / errors.reference - 1.0) } else { 0.0 };
        let (before, after) = (mean(errors.reference), mean(errors.chosen));
        out.push_str(&format!("{name:14}  {before:>9.3e}  {after:>9.3e}  {change:+.1} %\n"));
    };
    for gain in gains {
        row(gain.tensor.part(), gain.weights, gain.errors);
        weights += gain.weights;
        errors += gain.errors;
    }
    row("all", weights, errors);
    out
}

#[cfg(test)]
mod tests {
    use st_convert::tensor_map::Tensor;

    use super::*;

    #[test]
    fn gains_are_means_and_percentages() {
        let gain = |tensor, weights, reference, chosen| {
            let errors = SquaredErrors { reference, chosen };
            SearchGain { tensor, weights, errors }
        };
        let gains = [gain(Tensor::AttnQ, 100, 0.25, 0.2), gain(Tensor::FfnUpExps, 300, 0.0, 0.0)];
        let expected = "                  default   --search  mean squared error\n\
                        attn_q           2.500e-3   2.000e-3  -20.0 %\n\
                        ffn_up_exps       0.000e0    0.000e0  +0.0 %\n\
                        all              6.250e-4   5.000e-4  -20.0 %\n";
        assert_eq!(gains_table(&gains), expected);
    }
}
