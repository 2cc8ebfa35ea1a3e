//! What [`Table`](crate::table::Table) is asked and answers: places of slots, uses of leases, and why something has to wait.

/// Where a slot stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Empty.
    Free,
    /// Empty, and its memory is somebody else's.
    Withheld,
    /// Some pieces are still to come; pinned or not.
    Loading,
    /// Whole and in use.
    Pinned,
    /// Whole, used before, in the policy's order.
    Ordered,
    /// Whole, and a router has chosen it: kept for the request that is to come.
    Promised,
    /// Whole, loaded on a guess.
    Guessed,
    /// The load failed; pinned by those who still have to be told.
    Failed,
}

/// How a lease is going to use its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// A token's choice: worth keeping in the cache.
    Keep,
    /// Swept through once, as a prompt's waves do: what had to be read for it goes first, so that a prompt which touches
    /// more experts than there are slots does not push out everything that was warm.
    Sweep,
}

/// Whether a prefetch follows a router's choice or a guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Certainty {
    Chosen,
    Guess,
}

/// One pinned expert of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) slot: u32,
    pub(crate) key: u32,
    /// The matrices that were ready when it was pinned, as a mask.
    pub(crate) ready: u8,
}

/// Why an acquisition was not possible at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocked {
    /// Loads that nobody holds occupy the slots; they will end.
    OnLoads,
    /// Leases hold the slots.
    OnPins {
        /// Slots that the request lacks the experts for.
        needed: usize,
        /// Slots that could be given.
        free: usize,
    },
}

/// What finishing a piece leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// Nothing more to do.
    Done,
    /// Pieces were queued again.
    ReadAgain,
    /// The piece, or its whole record, is damaged (this was the checksum): the load has to be failed with [`Table::fail`].
    Corrupt(u32),
}
