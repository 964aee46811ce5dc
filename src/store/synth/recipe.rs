//! What a synthetic store computes, and the URL that says so.

use std::fmt;
use std::str::FromStr;

use bytesize::ByteSize;

use crate::model::{GIB, VolumeSize};

/// Versions that a lineage has at most.
pub const MAX_VERSIONS: u32 = 1000;

/// Lineages that a store has at most.
pub const MAX_LINEAGES: u32 = 1000;

/// The scheme of the URL.
pub(in crate::store) const SCHEME: &str = "synth";

/// Everything that the snapshots of a synthetic store are computed from, as its URL says it.
///
/// `Display` gives the URL with what is not as by default; it reads as the same recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The size of every volume.
    pub(super) size: VolumeSize,
    /// How many of its blocks the first version has.
    pub(super) density: Fraction,
    /// How many of those are zero blocks.
    pub(super) zeros: Fraction,
    /// Snapshots of a lineage.
    pub(super) versions: u32,
    /// Blocks in which a version differs from the one before it; at most all.
    pub(super) changed: u32,
    /// What all content depends on.
    pub(super) seed: u32,
    /// Families of snapshots that have nothing to do with each other.
    pub(super) lineages: u32,
    /// What data looks like.
    pub(super) content: Content,
}

/// What data looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// It cannot be compressed.
    Random,
    /// It can be compressed to about a quarter.
    Compressible,
}

/// A text that is no URL of a synthetic store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{url:?} is not a synthetic store: {why}; one is `synth:`, or `synth:?size=16TiB&density=0.5&versions=3&changed=1000`"
)]
pub struct InvalidRecipe {
    url: String,
    why: String,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            size: VolumeSize::from_gib(8).expect("8 GiB is a size"),
            density: Fraction::ONE,
            zeros: Fraction::NONE,
            versions: 2,
            changed: 64,
            seed: 0,
            lineages: 1,
            content: Content::Random,
        }
    }
}

impl FromStr for Recipe {
    type Err = InvalidRecipe;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        read(text).map_err(|why| InvalidRecipe { url: text.to_owned(), why })
    }
}

fn read(text: &str) -> Result<Recipe, String> {
    let query = match text.split_once(':') {
        Some((SCHEME, "")) => "",
        Some((SCHEME, rest)) => rest.strip_prefix('?').ok_or("its options begin with `?`")?,
        _ => return Err("it does not begin with `synth:`".to_owned()),
    };
    let mut recipe = Recipe::default();
    let mut seen = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} has no value"))?;
        if seen.contains(&key) {
            return Err(format!("{key} is given twice"));
        }
        seen.push(key);
        recipe.set(key, value).map_err(|what| format!("{key}={value}: {what}"))?;
    }
    let blocks = recipe.size.blocks();
    if recipe.changed > blocks.0 {
        let (changed, size) = (recipe.changed, recipe.size);
        return Err(format!("changed={changed}: a volume of {size} has {blocks} blocks"));
    }
    Ok(recipe)
}

impl Recipe {
    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "size" => self.size = size(value)?,
            "density" => self.density = value.parse()?,
            "zeros" => self.zeros = value.parse()?,
            "versions" => self.versions = number(value, 1, MAX_VERSIONS)?,
            "changed" => self.changed = number(value, 0, u32::MAX)?,
            "seed" => self.seed = number(value, 0, u32::MAX)?,
            "lineages" => self.lineages = number(value, 1, MAX_LINEAGES)?,
            "content" => self.content = value.parse()?,
            _ => {
                return Err(
                    "there are size, density, zeros, versions, changed, seed, lineages and content"
                        .to_owned(),
                );
            }
        }
        if self.density == Fraction::NONE {
            return Err("give more than 0, as 0.001".to_owned());
        }
        Ok(())
    }
}

fn size(text: &str) -> Result<VolumeSize, String> {
    let whole = || "give whole GiB, as 8GiB or 16TiB".to_owned();
    let bytes = ByteSize::from_str(text).map_err(|_| whole())?.as_u64();
    if bytes % GIB != 0 {
        return Err(whole());
    }
    VolumeSize::from_gib(bytes / GIB).map_err(|e| e.to_string())
}

fn number(text: &str, least: u32, most: u32) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("give a number from {least} to {most}"))
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by_default = Self::default();
        let mut options: Vec<String> = Vec::new();
        if self.size != by_default.size {
            let (gib, tib) = (self.size.gib(), self.size.gib() / 1024);
            let whole = gib == tib * 1024;
            options.push(if whole { format!("size={tib}TiB") } else { format!("size={gib}GiB") });
        }
        if self.density != by_default.density {
            options.push(format!("density={}", self.density));
        }
        if self.zeros != by_default.zeros {
            options.push(format!("zeros={}", self.zeros));
        }
        for (key, value, usual) in [
            ("versions", self.versions, by_default.versions),
            ("changed", self.changed, by_default.changed),
            ("seed", self.seed, by_default.seed),
            ("lineages", self.lineages, by_default.lineages),
        ] {
            if value != usual {
                options.push(format!("{key}={value}"));
            }
        }
        if self.content == Content::Compressible {
            options.push("content=compressible".to_owned());
        }
        write!(f, "{SCHEME}:")?;
        if options.is_empty() { Ok(()) } else { write!(f, "?{}", options.join("&")) }
    }
}

impl FromStr for Content {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "random" => Ok(Self::Random),
            "compressible" => Ok(Self::Compressible),
            _ => Err("give random or compressible".to_owned()),
        }
    }
}

/// A number from 0 to 1 with at most nine decimals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fraction {
    billionths: u32,
}

impl Fraction {
    pub(super) const NONE: Self = Self { billionths: 0 };
    pub(super) const ONE: Self = Self { billionths: 1_000_000_000 };

    /// The number below which this fraction of all 64-bit numbers is; `None` if all are.
    pub(super) fn bound(self) -> Option<u64> {
        let bound = (u128::from(self.billionths) << 64) / u128::from(Self::ONE.billionths);
        u64::try_from(bound).ok()
    }
}

impl FromStr for Fraction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let billionths = (digits(whole) && digits(decimals) && decimals.len() <= 9)
            .then(|| format!("{whole}{decimals:0<9}").parse().ok())
            .flatten()
            .filter(|&billionths| billionths <= Self::ONE.billionths);
        let billionths = billionths.ok_or("give a number up to 1 with up to nine decimals, as 0.5");
        Ok(Self { billionths: billionths? })
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.billionths {
            0 => f.write_str("0"),
            n if n == Self::ONE.billionths => f.write_str("1"),
            n => write!(f, "0.{}", format!("{n:09}").trim_end_matches('0')),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_option_is_read() {
        let text = "synth:?size=16TiB&density=0.5&zeros=0.01&versions=3&changed=1000&seed=7\
                    &lineages=2&content=compressible";
        let recipe: Recipe = text.parse().unwrap();
        assert_eq!(recipe.size.gib(), 16_384);
        assert_eq!(recipe.density.billionths, 500_000_000);
        assert_eq!(recipe.zeros.billionths, 10_000_000);
        assert_eq!((recipe.versions, recipe.changed, recipe.seed), (3, 1000, 7));
        assert_eq!((recipe.lineages, recipe.content), (2, Content::Compressible));
        assert_eq!(recipe.to_string(), text);
    }

    #[test]
    fn missing_options_have_their_defaults() {
        for text in ["synth:", "synth:?", "synth:?size=8GiB&density=1.0&content=random&seed=0"] {
            let recipe: Recipe = text.parse().unwrap();
            assert_eq!(recipe, Recipe::default(), "{text}");
            assert_eq!(recipe.to_string(), "synth:");
        }
    }

    #[test]
    fn names_a_wrong_option_with_a_right_example() {
        for (text, says) in [
            ("synth:size=1GiB", "begin with `?`"),
            ("synth://x", "begin with `?`"),
            ("file:?size=1GiB", "begin with `synth:`"),
            ("synth:?size", "no value"),
            ("synth:?seed=1&seed=1", "twice"),
            ("synth:?colour=red", "colour=red: there are size,"),
            ("synth:?size=0", "empty"),
            ("synth:?size=big", "size=big: give whole GiB"),
            ("synth:?size=1500MiB", "whole GiB"),
            ("synth:?size=65TiB", "64 TiB"),
            ("synth:?density=0", "more than 0"),
            ("synth:?density=1.1", "up to 1"),
            ("synth:?density=-1", "up to 1"),
            ("synth:?zeros=0.1234567891", "nine decimals"),
            ("synth:?zeros=.", "nine decimals"),
            ("synth:?versions=0", "from 1 to 1000"),
            ("synth:?versions=1001", "from 1 to 1000"),
            ("synth:?lineages=many", "from 1 to 1000"),
            ("synth:?seed=4294967296", "from 0 to 4294967295"),
            ("synth:?size=1GiB&changed=2049", "has 2048 blocks"),
            ("synth:?content=text", "random or compressible"),
        ] {
            let error = text.parse::<Recipe>().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
            let (_, example) = error.rsplit_once("or `").unwrap();
            let (example, _) = example.split_once('`').unwrap();
            assert!(example.parse::<Recipe>().is_ok(), "{error}");
        }
    }

    #[test]
    fn a_fraction_is_that_of_all_numbers() {
        let bound = |text: &str| text.parse::<Fraction>().unwrap().bound();
        assert_eq!(bound("0"), Some(0));
        assert_eq!(bound("0.5"), Some(1 << 63));
        assert_eq!(bound("0.25"), Some(1 << 62));
        assert_eq!(bound("1.000"), None);
    }

    pub(crate) fn fraction() -> impl Strategy<Value = Fraction> {
        (0..=1_000_000_000u32).prop_map(|billionths| Fraction { billionths })
    }

    proptest! {
        #[test]
        fn a_url_reads_as_it_was_written(
            gib in 1..=65_536u64,
            density in fraction(),
            zeros in fraction(),
            versions in 1..=MAX_VERSIONS,
            changed in 0..2048u32,
            seed: u32,
            lineages in 1..=MAX_LINEAGES,
            compressible: bool,
        ) {
            prop_assume!(density != Fraction::NONE);
            let size = VolumeSize::from_gib(gib).unwrap();
            let content = if compressible { Content::Compressible } else { Content::Random };
            let recipe =
                Recipe { size, density, zeros, versions, changed, seed, lineages, content };
            prop_assert_eq!(recipe.to_string().parse(), Ok(recipe));
        }
    }
}
