//! Files as `torch.save` writes them, by hand: an archive without compression of a pickle and of each
//! tensor's bytes.

use std::path::Path;

/// A tensor of a state dictionary, row-major.
pub struct Saved {
    pub key: String,
    /// `FloatStorage`, `CharStorage` or another of PyTorch's.
    pub storage: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Saved {
    pub fn floats(key: &str, shape: &[usize], values: &[f32]) -> Self {
        Self {
            key: key.to_owned(),
            storage: "FloatStorage",
            shape: shape.to_vec(),
            bytes: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }
}

pub fn write(path: &Path, tensors: &[Saved]) {
    let mut archive = Archive::default();
    archive.add("archive/data.pkl", &pickle(tensors));
    archive.add("archive/byteorder", b"little");
    for (at, tensor) in tensors.iter().enumerate() {
        archive.add(&format!("archive/data/{at}"), &tensor.bytes);
    }
    archive.add("archive/version", b"3\n");
    std::fs::write(path, archive.finish()).unwrap();
}

/// Protocol 2: a dictionary of calls of `torch._utils._rebuild_tensor_v2`.
fn pickle(tensors: &[Saved]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    for (at, tensor) in tensors.iter().enumerate() {
        let elements: usize = tensor.shape.iter().product();
        text(&mut out, &tensor.key);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        // The storage, by its persistent name.
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{}\n", tensor.storage).bytes());
        text(&mut out, &at.to_string());
        text(&mut out, "cpu");
        number(&mut out, elements);
        out.extend(b"tQ");
        number(&mut out, 0);
        let strides: Vec<usize> = (1..=tensor.shape.len())
            .map(|axis| tensor.shape[axis..].iter().product())
            .collect();
        for tuple in [&tensor.shape, &strides] {
            out.push(b'(');
            tuple.iter().for_each(|&value| number(&mut out, value));
            out.push(b't');
        }
        // No gradient, no hooks.
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn number(out: &mut Vec<u8>, value: usize) {
    out.push(b'J');
    out.extend((value as i32).to_le_bytes());
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directory: Vec<u8>,
    entries: u16,
}

impl Archive {
    fn add(&mut self, name: &str, data: &[u8]) {
        let offset = self.bytes.len() as u32;
        let mut header = Vec::new();
        // Version 2.0, no flags, stored, no time, the first of January 1980.
        for field in [20u16, 0, 0, 0, 0x21] {
            header.extend(field.to_le_bytes());
        }
        for field in [crc32(data), data.len() as u32, data.len() as u32] {
            header.extend(field.to_le_bytes());
        }
        header.extend((name.len() as u16).to_le_bytes());
        header.extend(0u16.to_le_bytes());
        self.bytes.extend(b"PK\x03\x04");
        self.bytes.extend(&header);
        self.bytes.extend(name.bytes());
        self.bytes.extend(data);

        self.directory.extend(b"PK\x01\x02\x14\x00");
        self.directory.extend(&header);
        // No comment, disk 0, no attributes.
        self.directory.extend([0; 10]);
        self.directory.extend(offset.to_le_bytes());
        self.directory.extend(name.bytes());
        self.entries += 1;
    }

    fn finish(mut self) -> Vec<u8> {
        let offset = self.bytes.len() as u32;
        self.bytes.extend(&self.directory);
        self.bytes.extend(b"PK\x05\x06\0\0\0\0");
        self.bytes.extend(self.entries.to_le_bytes());
        self.bytes.extend(self.entries.to_le_bytes());
        self.bytes
            .extend((self.directory.len() as u32).to_le_bytes());
        self.bytes.extend(offset.to_le_bytes());
        self.bytes.extend([0; 2]);
        self.bytes
    }
}

fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 * (crc & 1))
        })
    })
}
