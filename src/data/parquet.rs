//! Rows of a parquet file, only the columns that are asked for.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as ParquetRow};
use parquet::schema::types::Type;
use serde_json::Value;

use super::rows::{Limits, Row, RowSink};
use crate::{Error, Result};

/// Reads the root columns for which `wanted` is true, row by row.
///
/// A parquet file has no lines: places read "row 3", counted from 1. Text that is not UTF-8 and
/// broken pages end the reading with an error, since the columns behind them cannot be aligned
/// any more.
pub fn read_parquet(
    path: &Path,
    limits: &Limits,
    wanted: &dyn Fn(&str) -> bool,
    sink: &mut RowSink,
) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::file("open", path, e))?;
    let broken = |why: String| {
        Error::file(
            "read",
            path,
            format!("it is not a readable parquet file ({why})"),
        )
    };
    // The parquet crate panics on some broken files; that must stay a message about the file.
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(broken)?;
    let metadata = reader.metadata();
    let schema = metadata.file_metadata().schema_descr().root_schema();
    let columns: Vec<Arc<Type>> = schema
        .get_fields()
        .iter()
        .filter(|field| wanted(field.name()))
        .cloned()
        .collect();
    if columns.is_empty() {
        let names: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
        return Err(Error::file(
            "use",
            path,
            format!(
                "none of its columns is mapped (it has: {})",
                names.join(", ")
            ),
        ));
    }
    for column in &columns {
        check_readable(column).map_err(|why| Error::file("read", path, why))?;
    }
    let claimed: i64 = metadata.row_groups().iter().map(|g| g.num_rows()).sum();
    if claimed != metadata.file_metadata().num_rows() || claimed < 0 {
        return Err(broken("its row counts contradict each other".to_string()));
    }
    let projection = Type::group_type_builder(schema.name())
        .with_fields(columns)
        .build()
        .map_err(|e| broken(e.to_string()))?;

    let mut number = 0usize;
    for group in 0..metadata.num_row_groups() {
        let size = metadata.row_group(group).total_byte_size();
        if size < 0 || size as u64 > limits.kept_bytes as u64 {
            return Err(broken(format!("row group {group} claims {size} bytes")));
        }
        let group: Box<dyn RowGroupReader + '_> =
            guarded(|| reader.get_row_group(group)).map_err(broken)?;
        let mut rows =
            guarded(|| RowIter::from_row_group(Some(projection.clone()), group.as_ref()))
                .map_err(broken)?;
        loop {
            number += 1;
            let row = match guarded(|| rows.next().transpose()).map_err(|why| {
                Error::file("read", path, format!("row {number} is broken ({why})"))
            })? {
                Some(row) => to_json(row).and_then(|row| {
                    let size: usize = row.values().map(text_bytes).sum();
                    if size > limits.row_bytes {
                        Err(format!("is longer than {} bytes", limits.row_bytes))
                    } else {
                        Ok(row)
                    }
                }),
                None => {
                    number -= 1;
                    break;
                }
            };
            if sink(&format!("row {number}"), row)?.is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Runs a call into the parquet crate; its errors and panics become a short text.
fn guarded<T>(call: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T, String> {
    let mut text = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the parquet reader gave up on it".to_string(),
    };
    // Some messages carry the whole offending value.
    if let Some((at, _)) = text.char_indices().nth(200) {
        text.truncate(at);
        text.push('…');
    }
    Err(text)
}

/// The record reader panics on types it does not know: look before reading.
fn check_readable(column: &Type) -> Result<(), String> {
    if column.is_group() {
        return column
            .get_fields()
            .iter()
            .try_for_each(|f| check_readable(f));
    }
    use ConvertedType as C;
    let converted = column.get_basic_info().converted_type();
    // Nanosecond times have no converted type and would pass as plain numbers.
    let time = matches!(
        column.get_basic_info().logical_type_ref(),
        Some(LogicalType::Time(_) | LogicalType::Timestamp(_))
    );
    let known = !time
        && match column.get_physical_type() {
            Physical::BOOLEAN | Physical::FLOAT | Physical::DOUBLE | Physical::INT96 => true,
            Physical::INT32 => matches!(
                converted,
                C::NONE
                    | C::INT_8
                    | C::INT_16
                    | C::INT_32
                    | C::UINT_8
                    | C::UINT_16
                    | C::UINT_32
                    | C::DATE
                    | C::TIME_MILLIS
                    | C::DECIMAL
            ),
            Physical::INT64 => matches!(
                converted,
                C::NONE
                    | C::INT_64
                    | C::UINT_64
                    | C::TIME_MICROS
                    | C::TIMESTAMP_MILLIS
                    | C::TIMESTAMP_MICROS
                    | C::DECIMAL
            ),
            Physical::BYTE_ARRAY => matches!(
                converted,
                C::NONE | C::UTF8 | C::ENUM | C::JSON | C::BSON | C::DECIMAL
            ),
            Physical::FIXED_LEN_BYTE_ARRAY => matches!(converted, C::NONE | C::DECIMAL),
        };
    if known {
        Ok(())
    } else {
        Err(format!(
            "column {} has type {} ({converted}), which holds no text or number",
            column.name(),
            column.get_physical_type(),
        ))
    }
}

fn to_json(row: ParquetRow) -> Result<Row, String> {
    row.into_columns()
        .into_iter()
        .map(|(name, field)| {
            let value = value_of(field).map_err(|why| format!("has {why} in column {name}"))?;
            Ok((name, value))
        })
        .collect()
}

fn value_of(field: Field) -> Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(b) => b.into(),
        Field::Byte(n) => n.into(),
        Field::Short(n) => n.into(),
        Field::Int(n) => n.into(),
        Field::Long(n) => n.into(),
        Field::UByte(n) => n.into(),
        Field::UShort(n) => n.into(),
        Field::UInt(n) => n.into(),
        Field::ULong(n) => n.into(),
        Field::Float16(n) => f64::from(n.to_f32()).into(),
        // Through the shortest decimal text, so that 0.1f32 is 0.1 and not 0.10000000149.
        Field::Float(n) => n.to_string().parse::<f64>().unwrap_or(f64::NAN).into(),
        Field::Double(n) => n.into(),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data())
            .map_err(|_| "bytes that are not UTF-8".to_string())?
            .into(),
        Field::Group(row) => Value::Object(to_json(row)?),
        Field::ListInternal(list) => Value::Array(
            list.elements()
                .iter()
                .map(|f| value_of(f.clone()))
                .collect::<Result<_, _>>()?,
        ),
        other @ (Field::Decimal(_) | Field::Date(_)) => other.to_string().into(),
        _ => return Err("a time or a map".to_string()),
    })
}

fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.values().map(text_bytes).sum(),
        _ => 8,
    }
}
