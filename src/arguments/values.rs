//! Values of options: sizes, times, modes, tags.

use std::fmt;
use std::str::FromStr as _;

use bytesize::ByteSize;

use crate::cache::MIN_BUDGET;
use crate::store::repository::MIN_GRACE;

/// A number of bytes, which is written with a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) usize);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes % (1 << 30) == 0 => write!(f, "{}GiB", bytes >> 30),
            bytes => write!(f, "{}MiB", bytes >> 20),
        }
    }
}

pub(crate) fn memory(text: &str) -> Result<Size, String> {
    let size = ByteSize::from_str(text)
        .map_err(|_| "give a number with a unit, as 256MiB or 1GiB".to_owned())?;
    let bytes = usize::try_from(size.as_u64()).map_err(|_| "that is too much".to_owned())?;
    if bytes < MIN_BUDGET {
        return Err(format!("that is too little to work with: give at least {}", Size(MIN_BUDGET)));
    }
    Ok(Size(bytes))
}

pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let size = ByteSize::from_str(text);
    size.map(|size| size.as_u64()).map_err(|_| "give a number with a unit, as 20GiB".to_owned())
}

pub(crate) fn mode(text: &str) -> Result<u16, String> {
    match u16::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("give permissions in octal, as 0440".to_owned()),
    }
}

pub(crate) fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, _)) if key.starts_with("fspfs:") => {
            Err("keys that begin with `fspfs:` are kept for fspfs itself".to_owned())
        }
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("give a key and a value, as Role=web".to_owned()),
    }
}

pub(crate) fn account(text: &str) -> Result<String, String> {
    if text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(text.to_owned());
    }
    Err("an account has 12 digits".to_owned())
}

pub(crate) fn grace(text: &str) -> Result<humantime::Duration, String> {
    let time = humantime::Duration::from_str(text).map_err(|e| e.to_string())?;
    if *time < MIN_GRACE {
        return Err("writers may be at work: give at least 1h".to_owned());
    }
    Ok(time)
}
