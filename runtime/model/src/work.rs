//! What computing touched: tokens, bytes of weights, neurons.

/// What computing touched, counted since its counter began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens run.
    pub tokens: u64,
    /// Bytes of weights read by the kernels, dead neurons left out.
    pub weight_bytes: u64,
    /// Neurons of chosen experts, where they were looked at one by one.
    pub neurons: u64,
    /// Those of them that ReLU let through.
    pub live_neurons: u64,
}

impl Work {
    /// Counts `more` in.
    pub fn add(&mut self, more: &Self) {
        self.tokens += more.tokens;
        self.weight_bytes += more.weight_bytes;
        self.neurons += more.neurons;
        self.live_neurons += more.live_neurons;
    }

    /// What was added after `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            tokens: self.tokens - earlier.tokens,
            weight_bytes: self.weight_bytes - earlier.weight_bytes,
            neurons: self.neurons - earlier.neurons,
            live_neurons: self.live_neurons - earlier.live_neurons,
        }
    }
}
