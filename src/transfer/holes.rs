//! Holes that have to be put as zeros, since the snapshot is encrypted: what was not put of one may
//! read as anything but zeros on a volume (awslabs/coldsnap#395).

/// Holes of an encrypted snapshot that are put without being asked for, at most.
const MAX_HOLES: u64 = 100_000;

/// What a million puts cost in dollars (EBS direct pricing).
const PRICE_OF_A_MILLION: f64 = 6.0;

/// Why so many holes are not put, with what they would cost; `None` if they are few enough.
pub(crate) fn too_many(holes: u64) -> Option<String> {
    #[expect(clippy::cast_precision_loss, reason = "it is a price")]
    let price = holes as f64 * PRICE_OF_A_MILLION / 1e6;
    (holes > MAX_HOLES).then(|| {
        format!(
            "{holes} holes of an encrypted snapshot would have to be put, for about ${price:.2}; --encrypted-holes skip leaves them out"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_are_refused_with_their_price() {
        assert_eq!(too_many(100_000), None);
        let why = too_many(2_000_000).unwrap();
        assert!(why.contains("2000000 holes") && why.contains("$12.00"), "{why}");
    }
}
