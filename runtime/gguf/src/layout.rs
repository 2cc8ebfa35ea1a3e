//! The two layouts of experts: their names, their keys and how records are described.

use crate::{GgmlType, Metadata};

/// Metadata keys of the `offload` layout.
pub mod layout_keys {
    use crate::GgmlType;

    /// `"offload"`; a file in the `gguf` layout has no such key.
    pub const KIND: &str = "st.layout.kind";
    /// Version of the record format: [`VERSION_NUMBER`].
    pub const VERSION: &str = "st.layout.version";
    /// Bytes of one record; in version [`VERSION_BY_LAYER`] of those of each layer.
    pub const RECORD_BYTES: &str = "st.layout.record_bytes";
    /// Where the gate matrix starts in a record.
    pub const GATE_OFFSET: &str = "st.layout.gate_offset";
    /// Where the up matrix starts in a record.
    pub const UP_OFFSET: &str = "st.layout.up_offset";
    /// What [`UP_OFFSET`] was called in the first files; still read.
    pub const UP_OFFSET_BEFORE: &str = "st.layout.neuron_offset";
    /// Where the down matrix starts in a record.
    pub const DOWN_OFFSET: &str = "st.layout.down_offset";
    /// CRC-32C of every record, layer by layer.
    pub const CRC32C: &str = "st.layout.crc32c";
    /// ggml's number for the type of the experts' weights; in version [`VERSION_BY_LAYER`] those of gate, up and down of each layer.
    pub const EXPERT_TYPE: &str = "st.layout.expert_type";
    /// All of them, in the order they are written.
    pub const ALL: [&str; 8] = [KIND, VERSION, EXPERT_TYPE, RECORD_BYTES, GATE_OFFSET, UP_OFFSET, DOWN_OFFSET, CRC32C];
    /// Where gate, up and down start.
    pub const OFFSETS: [&str; 3] = [GATE_OFFSET, UP_OFFSET, DOWN_OFFSET];
    /// The value of [`KIND`].
    pub const KIND_OFFLOAD: &str = "offload";
    /// All records of a file lie alike, and hold weights of one type, which is one of [`ONE_TYPE`].
    pub const VERSION_NUMBER: u32 = 2;
    /// The keys are lists, with an entry for each layer: types differ between matrices or layers, or are others. Before it, 3 packed `down`
    /// in another order.
    pub const VERSION_BY_LAYER: u32 = 4;
    /// The types of version [`VERSION_NUMBER`].
    pub const ONE_TYPE: [GgmlType; 5] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q4_0];
    /// A record is a whole number of these.
    pub const RECORD_ALIGNMENT: u64 = 4096;
    /// Each matrix of a record starts at a multiple of this.
    pub const REGION_ALIGNMENT: u64 = 64;
}

/// How the records of one layer lie in the `offload` layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordLayout {
    /// Types of gate, up and down.
    pub types: [GgmlType; 3],
    /// Bytes of one record.
    pub bytes: u64,
    /// Where gate, up and down start in a record.
    pub starts: [u64; 3],
}

/// States the keys of the `offload` layout: how the records of each layer lie. The records' checksums are
/// [`reserve_checksums`](crate::reserve_checksums)'s.
pub fn describe_records(metadata: &mut Metadata, layers: &[RecordLayout]) {
    let Some(&first) = layers.first() else { return };
    metadata.insert(layout_keys::KIND, layout_keys::KIND_OFFLOAD);
    let alike = first.types == [first.types[0]; 3] && layers.iter().all(|layer| *layer == first);
    if alike && layout_keys::ONE_TYPE.contains(&first.types[0]) {
        metadata.insert(layout_keys::VERSION, layout_keys::VERSION_NUMBER);
        metadata.insert(layout_keys::EXPERT_TYPE, first.types[0].id());
        metadata.insert(layout_keys::RECORD_BYTES, first.bytes);
        for (key, start) in layout_keys::OFFSETS.into_iter().zip(first.starts) {
            metadata.insert(key, start);
        }
        return;
    }
    let each = |value: &dyn Fn(&RecordLayout) -> u64| layers.iter().map(value).collect::<Vec<_>>();
    metadata.insert(layout_keys::VERSION, layout_keys::VERSION_BY_LAYER);
    let types = layers.iter().flat_map(|layer| layer.types.map(GgmlType::id));
    metadata.insert(layout_keys::EXPERT_TYPE, types.collect::<Vec<_>>());
    metadata.insert(layout_keys::RECORD_BYTES, each(&|layer| layer.bytes));
    for (i, key) in layout_keys::OFFSETS.into_iter().enumerate() {
        metadata.insert(key, each(&|layer| layer.starts[i]));
    }
}

/// Names of the tensors that hold experts.
pub mod tensor_names {
    pub use st_format::tensor_names::{packed, stacked};

    use super::Layout;

    /// The layout in which a tensor of this name holds experts, and their layer; `None` for any other tensor.
    pub fn experts_in(name: &str) -> Option<(Layout, usize)> {
        let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
        let layout = match part {
            "ffn_exps.packed" => Layout::Offload,
            "ffn_gate_exps.weight" | "ffn_up_exps.weight" | "ffn_down_exps.weight" => Layout::Gguf,
            _ => return None,
        };
        Some((layout, layer.parse().ok()?))
    }
}

/// How a file arranges its experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// The standard one: per layer and matrix, one tensor of all experts.
    Gguf,
    /// Per layer, one tensor of page-aligned records, each one expert ready to compute.
    Offload,
}

impl Layout {
    /// `gguf` or `offload`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gguf => "gguf",
            Self::Offload => layout_keys::KIND_OFFLOAD,
        }
    }
}
