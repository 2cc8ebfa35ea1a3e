//! The output's name stands for a complete file or for what it was before.

use std::fs;
#[cfg(unix)]
use std::os::unix::fs::{PermissionsExt as _, symlink};

use st_gguf::{GgmlType, GgufError, GgufFile, GgufWriter, Metadata, TensorSpec, WriteOptions};

use crate::common::{counting, names_in, spec};

fn tensors() -> [TensorSpec; 1] {
    [spec("t", &[16], GgmlType::F32)]
}

/// Begins as a GGUF file does.
const OLDER: &str = "GGUF precious";

fn create(path: &std::path::Path, overwrite: bool) -> Result<GgufWriter, GgufError> {
    let options = WriteOptions { overwrite, ..WriteOptions::default() };
    GgufWriter::create(path, &Metadata::new(), &tensors(), options)
}

#[test]
fn pages_are_the_default_and_the_name_comes_last() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let mut writer = create(&path, false).unwrap();
    writer.write(&counting(64)).unwrap();
    assert_eq!(names_in(dir.path()), [".out.gguf.partial"]);
    writer.finish().unwrap();
    assert_eq!(names_in(dir.path()), ["out.gguf"]);
    let header = GgufFile::open(&path).unwrap().header;
    assert_eq!((header.alignment, header.data_offset, header.file_len), (4096, 4096, 8192));
}

#[test]
fn an_existing_file_stays_unless_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    fs::write(&path, OLDER).unwrap();
    let error = create(&path, false).unwrap_err();
    assert!(matches!(error, GgufError::Exists { .. }), "{error}");
    drop(create(&path, true).unwrap());
    assert_eq!(fs::read(&path).unwrap(), OLDER.as_bytes());
    let mut writer = create(&path, true).unwrap();
    writer.write(&counting(64)).unwrap();
    writer.finish().unwrap();
    assert!(GgufFile::open(&path).is_ok());
    assert_eq!(names_in(dir.path()), ["out.gguf"]);
}

#[test]
fn a_file_that_appears_meanwhile_stays_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let mut writer = create(&path, false).unwrap();
    writer.write(&counting(64)).unwrap();
    fs::write(&path, "precious").unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(error, GgufError::Exists { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(names_in(dir.path()), ["out.gguf"]);
}

#[test]
fn a_file_of_another_kind_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    for other in ["precious", "GG", "{}"] {
        fs::write(&path, other).unwrap();
        for overwrite in [false, true] {
            let error = create(&path, overwrite).unwrap_err();
            assert!(matches!(error, GgufError::OtherKind { .. }), "{error}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), other);
    }
    // Nothing is lost with an empty one, and one that comes to be there meanwhile is looked at, too.
    fs::write(&path, "").unwrap();
    let mut writer = create(&path, true).unwrap();
    writer.write(&counting(64)).unwrap();
    fs::write(&path, "precious").unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(error, GgufError::OtherKind { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(names_in(dir.path()), ["out.gguf"]);
}

#[test]
#[cfg(unix)]
fn what_is_replaced_hands_on_its_permissions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    // A partial file that everybody can read is left from before.
    let partial = dir.path().join(".out.gguf.partial");
    for given in [0o600, 0o440, 0o666] {
        fs::write(&path, OLDER).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(given)).unwrap();
        fs::write(&partial, "").unwrap();
        let mut writer = create(&path, true).unwrap();
        assert_eq!(mode(&partial) & !(given | 0o600), 0);
        writer.write(&counting(64)).unwrap();
        writer.finish().unwrap();
        assert_eq!(mode(&path), given);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
#[cfg(unix)]
fn a_link_stands_for_the_file_that_it_names() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("disk")).unwrap();
    let (link, file) = (dir.path().join("link.gguf"), dir.path().join("disk/file.gguf"));
    symlink("disk/file.gguf", &link).unwrap();
    for overwrite in [false, true] {
        let mut writer = create(&link, overwrite).unwrap();
        assert_eq!(names_in(&dir.path().join("disk")).first().unwrap(), ".file.gguf.partial");
        writer.write(&counting(64)).unwrap();
        writer.finish().unwrap();
        assert!(link.is_symlink() && GgufFile::open(&file).is_ok());
    }
    let circle = dir.path().join("circle.gguf");
    symlink("circle.gguf", &circle).unwrap();
    assert!(create(&circle, true).unwrap_err().to_string().contains("circle.gguf"));
}

#[test]
#[cfg(target_os = "linux")]
fn a_link_to_an_open_file_is_no_output() {
    use std::os::fd::AsRawFd as _;
    let dir = tempfile::tempdir().unwrap();
    let (link, file) = (dir.path().join("out.gguf"), dir.path().join("file.gguf"));
    fs::write(&file, OLDER).unwrap();
    let open = fs::File::open(&file).unwrap();
    symlink(format!("/dev/fd/{}", open.as_raw_fd()), &link).unwrap();
    for path in [&link, &fs::read_link(&link).unwrap()] {
        let error = create(path, true).unwrap_err();
        assert!(matches!(error, GgufError::Descriptor { .. }), "{error}");
    }
    assert!(link.is_symlink());
    assert_eq!(fs::read_to_string(&file).unwrap(), OLDER);
}

#[test]
fn names_as_long_as_a_name_can_be_are_written() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["n".repeat(255), "ä".repeat(127), "n".repeat(247), "m".repeat(255)] {
        let path = dir.path().join(&name);
        let mut writer = create(&path, false).unwrap();
        assert!(matches!(create(&path, false).unwrap_err(), GgufError::Busy { .. }), "one name for one output");
        writer.write(&counting(64)).unwrap();
        writer.finish().unwrap();
        assert!(GgufFile::open(&path).is_ok());
    }
    assert_eq!(names_in(dir.path()).len(), 4);
    assert!(create(&dir.path().join("n".repeat(256)), false).is_err());
    assert!(matches!(create(std::path::Path::new("-"), true).unwrap_err(), GgufError::Stdout { .. }));
}

#[test]
fn folders_and_devices_are_no_outputs() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path(), std::path::Path::new("/dev/full"), std::path::Path::new("/dev/null")] {
        let error = create(path, true).unwrap_err();
        assert!(matches!(error, GgufError::NotAFile { .. }), "{error}");
    }
    let error = create(&dir.path().join("no/such/folder.gguf"), false).unwrap_err();
    assert!(matches!(&error, GgufError::NoFolder { folder, .. } if *folder == dir.path().join("no/such")), "{error}");
    assert!(create(std::path::Path::new("/"), true).is_err());
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(create(&dir.path().join("file/out.gguf"), true).unwrap_err().to_string().contains("file/out.gguf"));
}

#[test]
fn dropping_removes_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = create(&dir.path().join("out.gguf"), false).unwrap();
    writer.write(&counting(10)).unwrap();
    drop(writer);
    assert!(names_in(dir.path()).is_empty());
}

#[test]
fn a_stale_partial_file_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    fs::write(dir.path().join(".out.gguf.partial"), vec![0xff; 100_000]).unwrap();
    let mut writer = create(&path, false).unwrap();
    writer.write(&counting(64)).unwrap();
    writer.finish().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 8192, "nothing of the stale file is left");
    assert_eq!(names_in(dir.path()), ["out.gguf"]);
}

#[test]
fn two_writers_of_one_file_notice_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let mut first = create(&path, false).unwrap();
    let error = create(&path, false).unwrap_err();
    assert!(matches!(error, GgufError::Busy { .. }), "{error}");
    first.write(&counting(64)).unwrap();
    first.finish().unwrap();
    assert!(GgufFile::open(&path).is_ok());
}

#[test]
#[cfg(unix)]
fn a_link_in_the_partial_files_place_leads_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let precious = dir.path().join("precious");
    fs::write(&precious, "precious").unwrap();
    symlink(&precious, dir.path().join(".out.gguf.partial")).unwrap();
    assert!(create(&dir.path().join("out.gguf"), false).is_err());
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
}

#[test]
fn too_little_and_too_much_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let mut writer = create(&path, false).unwrap();
    writer.write(&counting(63)).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(matches!(error, GgufError::DataSize { expected: 64, got: 63, .. }), "{error}");
    let mut writer = create(&path, false).unwrap();
    let error = writer.write(&counting(65)).unwrap_err();
    assert!(matches!(error, GgufError::DataSize { expected: 64, got: 65, .. }), "{error}");
    drop(writer);
    assert!(names_in(dir.path()).is_empty());
}

#[test]
fn a_disk_that_is_too_small_is_noticed_before_the_first_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let huge = [spec("t", &[1 << 60], GgmlType::I8)];
    let error = GgufWriter::create(&path, &Metadata::new(), &huge, WriteOptions::default()).unwrap_err();
    assert!(matches!(error, GgufError::NoSpace { available: Some(_), source: None, .. }), "{error}");
    assert!(error.to_string().contains("not enough disk space: 11529215046068"), "{error}");
    assert!(names_in(dir.path()).is_empty());
}

#[test]
fn metadata_is_replaced_where_the_size_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("sums", vec![0u32; 4]);
    let mut writer = GgufWriter::create(&path, &metadata, &tensors(), WriteOptions::default()).unwrap();
    writer.write(&counting(64)).unwrap();
    metadata.insert("more", "x".repeat(5000));
    let error = writer.replace_metadata(&metadata).unwrap_err();
    assert!(error.to_string().contains("replaced metadata"), "{error}");
    metadata.remove("more");
    metadata.insert("sums", vec![1u32, 2, 3, 4]);
    writer.replace_metadata(&metadata).unwrap();
    writer.finish().unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.header.metadata.u32s("sums").unwrap(), Some(vec![1, 2, 3, 4]));
    assert_eq!(file.read_tensor(&file.header.tensors[0]).unwrap(), counting(64));
}
