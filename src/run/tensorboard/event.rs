//! The protocol buffers of an event file, as far as scalars and texts need them.
//!
//! Field numbers are those of tensorboard's `event.proto`, `summary.proto`, `tensor.proto` and
//! `tensor_shape.proto`.

/// What an event holds.
#[derive(Debug, Clone, PartialEq)]
pub enum What<'a> {
    /// The first event of every file.
    Version,
    /// Tags with their values.
    Scalars(&'a [(String, f64)]),
    /// Tags with their texts, in Markdown.
    Texts(&'a [(String, String)]),
}

/// One serialised `Event`. `wall_time` is in seconds since 1970.
pub fn event(wall_time: f64, step: u64, what: &What<'_>) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, wall_time);
    if step > 0 {
        event.varint(2, step);
    }
    match what {
        What::Version => event.bytes(3, b"brain.Event:2"),
        What::Scalars(values) => {
            let values = values.iter().map(|(tag, value)| scalar(tag, *value));
            event.message(5, &summary(values));
        }
        What::Texts(texts) => {
            let texts = texts.iter().map(|(tag, text)| self::text(tag, text));
            event.message(5, &summary(texts));
        }
    }
    event.0
}

/// `Summary`.
fn summary(values: impl Iterator<Item = Message>) -> Message {
    let mut summary = Message::default();
    values.for_each(|value| summary.message(1, &value));
    summary
}

/// `Summary.Value` with `simple_value`.
fn scalar(tag: &str, value: f64) -> Message {
    let mut message = Message::default();
    message.bytes(1, tag.as_bytes());
    message.float(2, value as f32);
    message
}

/// `Summary.Value` with a tensor of one string, for the plugin `text`.
fn text(tag: &str, text: &str) -> Message {
    const DT_STRING: u64 = 7;
    let (mut plugin, mut metadata) = (Message::default(), Message::default());
    plugin.bytes(1, b"text");
    metadata.message(1, &plugin);
    let (mut dim, mut shape, mut tensor) =
        (Message::default(), Message::default(), Message::default());
    dim.varint(1, 1);
    shape.message(2, &dim);
    tensor.varint(1, DT_STRING);
    tensor.message(2, &shape);
    tensor.bytes(8, text.as_bytes());
    let mut message = Message::default();
    message.bytes(1, tag.as_bytes());
    message.message(8, &tensor);
    message.message(9, &metadata);
    message
}

/// A protocol buffer being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// Field number and wire type: 0 varint, 1 eight bytes, 2 with its length, 5 four bytes.
    fn key(&mut self, field: u64, wire: u64) {
        self.raw(field << 3 | wire);
    }

    /// Seven bits a byte, the lowest first.
    fn raw(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw(value.len() as u64);
        self.0.extend(value);
    }

    fn message(&mut self, field: u64, value: &Self) {
        self.bytes(field, &value.0);
    }
}
