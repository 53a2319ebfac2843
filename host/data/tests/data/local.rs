//! Datasets on disk.

use std::sync::Arc;

use arrow::array::*;
use arrow::datatypes::{DataType, Field, Int32Type};
use cosmos_data::{DataError, DatasetSpec, Table, TestSize, split_test};
use serde_json::{Value, json};
use tempfile::tempdir;

use super::{arrow_bytes, batch, numbers, offline, open, parquet_bytes, spec, write};

#[test]
fn saved_to_disk_real() {
    for name in ["math_examples_hf_disk", "sharegpt_small_hf_disk"] {
        let Some(folder) = cosmos_testkit::shared_data(name) else { continue };
        let info = cosmos_testkit::read_json(&folder.join("train/dataset_info.json"));
        let table = open(&folder, &["train"]).unwrap();
        let features: Vec<&String> = info["features"].as_object().unwrap().keys().collect();
        assert!(table.columns().iter().map(|c| &c.name).eq(features), "{name}: {:?}", table.columns());
        // Read by another reader of the same library, batch by batch.
        let file = std::fs::File::open(folder.join("train/data-00000-of-00001.arrow")).unwrap();
        let reader = arrow::ipc::reader::StreamReader::try_new(file, None).unwrap();
        let rows: usize = reader.map(|batch| batch.unwrap().num_rows()).sum();
        assert_eq!(table.len(), rows as u64, "{name}");
        let all = table.rows(0, table.len(), &[]).unwrap();
        let last = table.rows_at(&[table.len() - 1, 0], &[]).unwrap();
        assert_eq!((&last[0], &last[1]), (&all[rows - 1], &all[0]));
        assert!(all.iter().all(|row| row.len() == table.columns().len()));
    }
}

#[test]
fn nested_conversations_real() {
    let Some(folder) = cosmos_testkit::shared_data("sharegpt_small_hf_disk") else { return };
    let table = open(&folder, &[]).unwrap();
    let row = &table.rows(0, 1, &["conversation"]).unwrap()[0];
    let turns = row["conversation"].as_array().unwrap();
    assert!(!turns.is_empty() && turns.iter().all(|turn| turn["role"].is_string() && turn["content"].is_string()));
}

#[test]
fn json_lines_real() {
    for name in ["gsm8k_train.jsonl", "gsm8k_test.jsonl", "aime24.jsonl", "amc23.jsonl"] {
        let Some(path) = cosmos_testkit::shared_data(name) else { continue };
        let expected = cosmos_testkit::read_jsonl(&path);
        let table = open(&path, &["train"]).unwrap();
        assert_eq!(table.len(), expected.len() as u64, "{name}");
        let rows = table.rows(0, table.len(), &[]).unwrap();
        assert!(rows.into_iter().map(Value::Object).eq(expected), "{name}");
    }
    let Some(path) = cosmos_testkit::shared_data("gsm8k_test.jsonl") else { return };
    let both = open(&path, &["test[:2]+train[-1:]"]).unwrap();
    assert_eq!(both.len(), 3);
    let error = open(&path, &["validation"]).unwrap_err();
    assert!(error.to_string().ends_with("has no split `validation`; it has `train`, `test`"), "{error}");
    let held_out = split_test(open(&path, &[]).unwrap().len(), TestSize::Ratio(0.1)).unwrap();
    assert_eq!((held_out.test, held_out.train.start), (0..131, 131));
}

#[test]
fn splits_of_a_parquet_folder() {
    let dir = tempdir().unwrap();
    write(dir.path().join("data/train-00000-of-00002.parquet"), parquet_bytes(&batch(0, 100), 30));
    write(dir.path().join("data/train-00001-of-00002.parquet"), parquet_bytes(&batch(100, 120), 7));
    write(dir.path().join("data/test-00000-of-00001.parquet"), parquet_bytes(&batch(500, 510), 100));
    let train = open(dir.path(), &["train"]).unwrap();
    assert_eq!(numbers(&train), (0..120).collect::<Vec<_>>());
    let cut = open(dir.path(), &["test[5:]", "train[99:102]"]).unwrap();
    assert_eq!(numbers(&cut), [505, 506, 507, 508, 509, 99, 100, 101]);
    let rows = train.rows_at(&[119, 3, 3, 4, 99, 100], &["text", "n"]).unwrap();
    let found: Vec<_> = rows.iter().map(|row| row["text"].as_str().unwrap()).collect();
    assert_eq!(found, ["row 119", "row 3", "row 3", "row 4", "row 99", "row 100"]);
    assert!(rows[0].keys().eq(["text", "n"]));
    assert!(matches!(open(dir.path(), &[]), Err(DataError::SplitNeeded { known, .. }) if known == ["train", "test"]));
    let error = open(dir.path(), &["dev"]).unwrap_err();
    assert!(error.to_string().ends_with("has no split `dev`; it has `train`, `test`"), "{error}");
    assert_eq!(error.hint().unwrap(), "set `dataset.split` to one of these");
    std::fs::remove_file(dir.path().join("data/train-00000-of-00002.parquet")).unwrap();
    let error = open(dir.path(), &["train"]).unwrap_err();
    assert!(error.to_string().contains("lacks `data/train-00000-of-00002`"), "{error}");
}

#[test]
fn rows_beyond_one_chunk() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("long.parquet");
    write(&path, parquet_bytes(&batch(0, 20_000), 20_000));
    let table = open(&path, &[]).unwrap();
    assert_eq!(numbers(&table), (0..20_000).collect::<Vec<_>>());
    let rows = table.rows(8190, 4, &["n"]).unwrap();
    assert!(rows.iter().map(|row| row["n"].as_i64().unwrap()).eq(8190..8194));
}

#[test]
fn arrow_stream_and_file_and_compressed() {
    let dir = tempdir().unwrap();
    let batches = [batch(0, 10), batch(10, 10), batch(10, 35)];
    write(dir.path().join("stream.arrow"), arrow_bytes(&batches));
    let zstd = arrow::ipc::writer::IpcWriteOptions::default()
        .try_with_compression(Some(arrow::ipc::CompressionType::ZSTD))
        .unwrap();
    let mut writer =
        arrow::ipc::writer::FileWriter::try_new_with_options(Vec::new(), &batches[0].schema(), zstd).unwrap();
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    write(dir.path().join("file.arrow"), writer.into_inner().unwrap());
    for name in ["stream.arrow", "file.arrow"] {
        let table = open(dir.path().join(name), &[]).unwrap();
        assert_eq!(numbers(&table), (0..35).collect::<Vec<_>>(), "{name}");
        let rows = table.rows_at(&[34, 9, 10], &[]).unwrap();
        assert_eq!(Value::Object(rows[2].clone()), json!({"n": 10, "text": "row 10"}));
    }
}

#[test]
fn every_kind_of_value() {
    let mut list = ListBuilder::new(StringBuilder::new());
    list.append_value([Some("a"), None]);
    list.append_null();
    let point = StructArray::from(vec![
        (
            Arc::new(Field::new("x", DataType::Float32, true)),
            Arc::new(Float32Array::from(vec![0.1, f32::NAN])) as ArrayRef,
        ),
        (
            Arc::new(Field::new("big", DataType::LargeUtf8, true)),
            Arc::new(LargeStringArray::from(vec![Some("é"), None])) as ArrayRef,
        ),
    ]);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("list", Arc::new(list.finish())),
        ("point", Arc::new(point)),
        ("class", Arc::new(DictionaryArray::<Int32Type>::from_iter(["cat", "dog"]))),
        ("time", Arc::new(TimestampMillisecondArray::from(vec![0, 1_700_000_000_123]))),
        ("day", Arc::new(Date32Array::from(vec![0, 20_000]))),
        ("price", Arc::new(Decimal128Array::from(vec![1250, -5]).with_precision_and_scale(10, 2).unwrap())),
        ("flag", Arc::new(BooleanArray::from(vec![Some(true), None]))),
        ("huge", Arc::new(UInt64Array::from(vec![u64::MAX, 0]))),
        ("bytes", Arc::new(BinaryArray::from_vec(vec![b"\xff\x00", b""]))),
        ("view", Arc::new(StringViewArray::from(vec!["short", "a text that is longer than twelve bytes"]))),
    ];
    let batch = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).unwrap();
    let expected = [
        json!({"list": ["a", null], "point": {"x": 0.1, "big": "é"}, "class": "cat", "time": "1970-01-01T00:00:00",
            "day": "1970-01-01", "price": 12.5, "flag": true, "huge": u64::MAX, "bytes": "ff00", "view": "short"}),
        json!({"list": null, "point": {"x": null, "big": null}, "class": "dog", "time": "2023-11-14T22:13:20.123",
            "day": "2024-10-04", "price": -0.05, "flag": null, "huge": 0, "bytes": "", "view": "a text that is longer than twelve bytes"}),
    ];
    let dir = tempdir().unwrap();
    write(dir.path().join("a.parquet"), parquet_bytes(&batch, 10));
    write(dir.path().join("b.arrow"), arrow_bytes(std::slice::from_ref(&batch)));
    for name in ["a.parquet", "b.arrow"] {
        let table = open(dir.path().join(name), &[]).unwrap();
        let rows = table.rows(0, 2, &[]).unwrap();
        assert!(rows.into_iter().map(Value::Object).eq(expected.clone()), "{name}");
    }
}

#[test]
fn json_list_and_ragged_lines() {
    let dir = tempdir().unwrap();
    write(dir.path().join("list.json"), "\u{feff}[{\"a\": 1}, {\"b\": [null], \"a\": \"x\"}]");
    let table = open(dir.path().join("list.json"), &[]).unwrap();
    let kinds: Vec<_> = table.columns().iter().map(|c| (c.name.as_str(), c.kind.as_str())).collect();
    assert_eq!(kinds, [("a", "mixed"), ("b", "list")]);
    write(dir.path().join("lines.jsonl"), "{\"a\": null}\r\n\n{\"b\": true, \"a\": 2}");
    let table = open(dir.path().join("lines.jsonl"), &[]).unwrap();
    assert_eq!(table.columns()[0].kind, "number");
    let rows: Vec<_> = table.rows(0, 2, &["b", "a"]).unwrap().into_iter().map(Value::Object).collect();
    assert_eq!(rows, [json!({"b": null, "a": null}), json!({"b": true, "a": 2})]);
}

#[test]
fn saved_single_dataset_and_local_dir() {
    let dir = tempdir().unwrap();
    write(
        dir.path().join("set/state.json"),
        json!({"_data_files": [{"filename": "a.arrow"}, {"filename": "b.arrow"}], "_split": "test"}).to_string(),
    );
    write(dir.path().join("set/a.arrow"), arrow_bytes(&[batch(0, 3)]));
    write(dir.path().join("set/b.arrow"), arrow_bytes(&[batch(3, 5)]));
    assert_eq!(numbers(&open(dir.path().join("set"), &["test"]).unwrap()), [0, 1, 2, 3, 4]);
    assert!(
        matches!(open(dir.path().join("set"), &["train"]), Err(DataError::MissingSplit { known, .. }) if known == ["test"])
    );
    let mut named = DatasetSpec { local_dir: dir.path().to_str().unwrap().into(), ..spec("set", "", &[]) };
    assert_eq!(Table::open(&named, &offline()).unwrap().len(), 5);
    named.local_dir = "/nonexistent/folder".into();
    assert!(matches!(Table::open(&named, &offline()), Err(DataError::NoSuchDataset { .. })));
    write(dir.path().join("set/state.json"), json!({"_data_files": [{"filename": "../secret.arrow"}]}).to_string());
    let error = open(dir.path().join("set"), &[]).unwrap_err();
    assert!(error.to_string().contains("`../secret.arrow` leads out of the folder"), "{error}");
}

#[test]
fn truncated_files_name_place_and_line() {
    let dir = tempdir().unwrap();
    let arrow = arrow_bytes(&[batch(0, 50), batch(50, 100)]);
    let parquet = parquet_bytes(&batch(0, 100), 50);
    for (name, bytes) in [("a.arrow", &arrow), ("b.parquet", &parquet)] {
        let path = dir.path().join(name);
        // The end mark of an Arrow stream is 8 bytes long.
        for cut in [1, 5, 9, 40, bytes.len() / 2, bytes.len() - 4, bytes.len()] {
            write(&path, &bytes[..bytes.len() - cut]);
            let error = open(&path, &[]).unwrap_err();
            assert!(error.to_string().contains(&path.display().to_string()), "{error}");
            assert!(matches!(error, DataError::Broken { .. }) && error.hint().is_some(), "{error}");
        }
    }
    let path = dir.path().join("c.jsonl");
    write(&path, "{\"a\": 1}\n\n{\"a\": 2}\n{\"a\": \"x");
    let error = open(&path, &[]).unwrap_err();
    let expected =
        format!("`{}` line 4 is broken: the file is truncated: EOF while parsing a string at column 8", path.display());
    assert_eq!(error.to_string(), expected);
    write(&path, "{\"a\": 1}\n[2]\n{\"a\": 3}\n");
    let error = open(&path, &[]).unwrap_err();
    assert!(error.to_string().contains("line 2 is broken: invalid type: sequence, expected a JSON object"), "{error}");
}

#[test]
fn missing_things_are_named() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("train.parquet");
    write(&path, parquet_bytes(&batch(0, 4), 10));
    let table = open(&path, &[]).unwrap();
    let error = table.rows(0, 1, &["n", "question"]).unwrap_err();
    assert!(error.to_string().ends_with("has no column `question`; it has `n`, `text`"), "{error}");
    assert!(matches!(table.rows(3, 2, &[]), Err(DataError::NoSuchRow { row: 4, len: 4, .. })));
    assert!(matches!(table.rows(u64::MAX, u64::MAX, &[]), Err(DataError::NoSuchRow { .. })));
    assert!(matches!(table.rows_at(&[0, 9], &[]), Err(DataError::NoSuchRow { row: 9, .. })));
    assert_eq!(table.rows(4, 0, &[]).unwrap().len(), 0);
    write(dir.path().join("empty.jsonl"), "\n\n");
    let error = open(dir.path().join("empty.jsonl"), &[]).unwrap_err();
    assert!(matches!(error, DataError::Empty { .. }), "{error}");
    assert!(matches!(open(&path, &["train[:0]"]), Err(DataError::Empty { .. })));
    assert!(matches!(open("./nothing/here.parquet", &[]), Err(DataError::NoSuchDataset { .. })));
    assert!(matches!(open("nothing.parquet", &[]), Err(DataError::NoSuchDataset { .. })));
    write(dir.path().join("x.csv"), "a,b\n");
    assert!(matches!(open(dir.path().join("x.csv"), &[]), Err(DataError::UnknownFormat { .. })));
    write(dir.path().join("csv/x.csv"), "a,b\n");
    assert!(
        matches!(open(dir.path().join("csv"), &[]), Err(DataError::NoDataFiles { found, .. }) if found == ["x.csv"])
    );
    write(dir.path().join("mixed/a.parquet"), parquet_bytes(&batch(0, 4), 10));
    let other = RecordBatch::try_from_iter([("m", Arc::new(Int64Array::from(vec![1])) as ArrayRef)]).unwrap();
    write(dir.path().join("mixed/b.parquet"), parquet_bytes(&other, 10));
    let error = open(dir.path().join("mixed"), &[]).unwrap_err();
    assert!(error.to_string().ends_with("has the columns `m`, but the files before it have `n`, `text`"), "{error}");
}

#[test]
fn many_threads_read_one_table() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    write(&path, parquet_bytes(&batch(0, 1000), 100));
    let table = open(&path, &[]).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let table = &table;
            scope.spawn(move || {
                for row in (0..1000).rev().skip(thread).step_by(7) {
                    assert_eq!(table.rows(row, 1, &["n"]).unwrap()[0]["n"], json!(row));
                }
            });
        }
    });
}
