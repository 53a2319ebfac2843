;; A guest with the C library's imports that does to a path below its first granted folder what a completion says:
;; `r` reads it, `w` makes or overwrites it, `u` removes it, `m` makes a folder, `l` makes a link to `/etc`, `d` renames
;; it to `moved`. The score is 1000 plus the bytes read, or 1000 for other successes, or the error number.
(import "wasi_snapshot_preview1" "path_open"
  (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
(import "wasi_snapshot_preview1" "path_unlink_file" (func $unlink (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_create_directory" (func $mkdir (param i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_symlink" (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_rename" (func $rename (param i32 i32 i32 i32 i32 i32) (result i32)))
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(data (i32.const 2048) "/etcmovedpwned")
(func $opened (param $at i32) (param $bytes i32) (param $flags i32) (param $rights i64) (result i32)
  ;; Links are followed; the handle lands at 3000.
  (call $open (i32.const 3) (i32.const 1) (local.get $at) (local.get $bytes) (local.get $flags) (local.get $rights)
    (i64.const 0) (i32.const 0) (i32.const 3000)))
(func $do (param $what i32) (param $at i32) (param $bytes i32) (result i32)
  (local $error i32)
  (if (i32.eq (local.get $what) (i32.const 114)) (then
    (local.set $error (call $opened (local.get $at) (local.get $bytes) (i32.const 0) (i64.const 2)))
    (if (local.get $error) (then (return (local.get $error))))
    (i32.store (i32.const 3008) (i32.const 3100)) (i32.store (i32.const 3012) (i32.const 512))
    (local.set $error (call $read (i32.load (i32.const 3000)) (i32.const 3008) (i32.const 1) (i32.const 3016)))
    (drop (call $close (i32.load (i32.const 3000))))
    (if (local.get $error) (then (return (local.get $error))))
    (return (i32.add (i32.const 1000) (i32.load (i32.const 3016))))))
  (if (i32.eq (local.get $what) (i32.const 119)) (then
    ;; Create and truncate, for writing.
    (local.set $error (call $opened (local.get $at) (local.get $bytes) (i32.const 9) (i64.const 64)))
    (if (local.get $error) (then (return (local.get $error))))
    (i32.store (i32.const 3008) (i32.const 2057)) (i32.store (i32.const 3012) (i32.const 5))
    (local.set $error (call $write (i32.load (i32.const 3000)) (i32.const 3008) (i32.const 1) (i32.const 3016)))
    (drop (call $close (i32.load (i32.const 3000))))
    (return (select (local.get $error) (i32.const 1000) (local.get $error)))))
  (if (i32.eq (local.get $what) (i32.const 117))
    (then (local.set $error (call $unlink (i32.const 3) (local.get $at) (local.get $bytes)))))
  (if (i32.eq (local.get $what) (i32.const 109))
    (then (local.set $error (call $mkdir (i32.const 3) (local.get $at) (local.get $bytes)))))
  (if (i32.eq (local.get $what) (i32.const 108))
    (then (local.set $error (call $symlink (i32.const 2048) (i32.const 4) (i32.const 3) (local.get $at) (local.get $bytes)))))
  (if (i32.eq (local.get $what) (i32.const 100))
    (then (local.set $error
      (call $rename (i32.const 3) (local.get $at) (local.get $bytes) (i32.const 3) (i32.const 2052) (i32.const 5)))))
  (select (local.get $error) (i32.const 1000) (local.get $error)))
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $list i32) (local $item i32) (local $at i32)
  (local.set $list (call $lengths (local.get $samples) (local.get $count)))
  (block $done
    (loop $next
      (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
      (local.set $at (i32.add (local.get $samples) (i32.mul (local.get $item) (i32.const 32))))
      (call $set (local.get $list) (local.get $item) (f64.convert_i32_u (call $do
        (call $first (local.get $samples) (local.get $item))
        (i32.add (i32.load offset=8 (local.get $at)) (i32.const 1))
        (i32.sub (i32.load offset=12 (local.get $at)) (i32.const 1)))))
      (local.set $item (i32.add (local.get $item) (i32.const 1)))
      (br $next)))
  (local.get $list))
