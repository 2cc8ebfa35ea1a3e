//! What a conversion makes of its input, as its caller chooses it.

use std::sync::Arc;

use st_gguf::{Layout, TensorSpec};
use st_kernels::WeightType;

use crate::imatrix::Imatrix;

/// What to make of an input.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Type of the weight matrices. Norms and routers stay F32.
    pub ty: WeightType,
    /// Type of the embedding and of the LM head, where it is another.
    pub output_type: Option<WeightType>,
    /// Arrangement of the experts.
    pub layout: Layout,
    /// Threads that convert; one more writes. The bytes do not depend on it.
    pub threads: usize,
    /// For Q4_0: choose each block's scale for the least squared error instead of the reference's.
    pub search: bool,
    /// How much columns matter to that search.
    pub imatrix: Option<Arc<Imatrix>>,
    /// Whether weights below 8 bits may be quantized again as another type.
    pub requantize: bool,
    /// A tensor besides the model's own, which this crate does not look into: its name, shape and type, and its bytes.
    pub extra: Option<(TensorSpec, Arc<[u8]>)>,
    /// Whether a tied model keeps an LM head that it stores beside the embedding and that differs from it.
    pub keep_head: bool,
}

impl ConvertOptions {
    /// Everything as type `ty` on one thread, and nothing that has to be asked for.
    pub fn new(ty: WeightType, layout: Layout) -> Self {
        Self {
            ty,
            output_type: None,
            layout,
            threads: 1,
            search: false,
            imatrix: None,
            requantize: false,
            extra: None,
            keep_head: false,
        }
    }
}
