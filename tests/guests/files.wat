;; A guest that tries to reach files through the first granted directory (WASI preview 1). The first byte of the first
;; completion says how, the rest is the path; the score is the system's error, and 0 when it worked:
;; `r` reads: 1000 and the first byte of the file; `w` opens for writing, `c` creates; `u` removes; `d` makes a folder;
;; `l` makes a symbolic link to `/etc`; `t` sets the size of an open file to 0.
(import "wasi_snapshot_preview1" "path_open"
  (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_filestat_set_size" (func $set_size (param i32 i64) (result i32)))
(import "wasi_snapshot_preview1" "path_unlink_file" (func $unlink (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_create_directory" (func $mkdir (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_symlink" (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(data (i32.const 2048) "/etc")

;; Rights: fd_read is 2, fd_write 64, fd_filestat_set_size 4194304.
(func $opened (param $path i32) (param $bytes i32) (param $flags i32) (param $rights i64) (result i32)
  (call $open (i32.const 3) (i32.const 1) (local.get $path) (local.get $bytes) (local.get $flags)
    (local.get $rights) (local.get $rights) (i32.const 0) (i32.const 3000)))

(func $try (param $how i32) (param $path i32) (param $bytes i32) (result i32)
  (local $error i32)
  (if (i32.eq (local.get $how) (i32.const 114)) (then
    (local.set $error (call $opened (local.get $path) (local.get $bytes) (i32.const 0) (i64.const 2)))
    (if (local.get $error) (then (return (local.get $error))))
    (i32.store (i32.const 3008) (i32.const 3100))
    (i32.store (i32.const 3012) (i32.const 1))
    (local.set $error (call $read (i32.load (i32.const 3000)) (i32.const 3008) (i32.const 1) (i32.const 3004)))
    (if (local.get $error) (then (return (local.get $error))))
    (return (i32.add (i32.const 1000) (i32.load8_u (i32.const 3100))))))
  (if (i32.eq (local.get $how) (i32.const 119)) (then
    (return (call $opened (local.get $path) (local.get $bytes) (i32.const 0) (i64.const 64)))))
  (if (i32.eq (local.get $how) (i32.const 99)) (then
    (return (call $opened (local.get $path) (local.get $bytes) (i32.const 1) (i64.const 66)))))
  (if (i32.eq (local.get $how) (i32.const 116)) (then
    (local.set $error (call $opened (local.get $path) (local.get $bytes) (i32.const 0) (i64.const 4194306)))
    (if (local.get $error) (then (return (local.get $error))))
    (return (call $set_size (i32.load (i32.const 3000)) (i64.const 0)))))
  (if (i32.eq (local.get $how) (i32.const 117)) (then
    (return (call $unlink (i32.const 3) (local.get $path) (local.get $bytes)))))
  (if (i32.eq (local.get $how) (i32.const 100)) (then
    (return (call $mkdir (i32.const 3) (local.get $path) (local.get $bytes)))))
  (if (i32.eq (local.get $how) (i32.const 108)) (then
    (return (call $symlink (i32.const 2048) (i32.const 4) (i32.const 3) (local.get $path) (local.get $bytes)))))
  (i32.const -1))

(func $score (param $samples i32) (param $count i32) (result i32)
  (local $list i32)
  (local.set $list (call $lengths (local.get $samples) (local.get $count)))
  (call $set (local.get $list) (i32.const 0)
    (f64.convert_i32_s (call $try
      (call $first (local.get $samples) (i32.const 0))
      (i32.add (i32.load offset=8 (local.get $samples)) (i32.const 1))
      (i32.sub (i32.load offset=12 (local.get $samples)) (i32.const 1)))))
  (local.get $list))
