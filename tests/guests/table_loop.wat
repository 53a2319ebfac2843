;; `table_rows` with a twist: index 13 reads its row for ever, index 14 opens the table for ever.
;; A dataset over the host's table `data`: each row's JSON is the prompt, the reference and nothing else.
(module
  (import "cosmos:plugin/table@0.1.0" "open" (func $open (param i32 i32 i32 i32 i32 i32 i32 i32 i32)))
  (import "cosmos:plugin/table@0.1.0" "[method]rows.len" (func $len (param i32) (result i64)))
  (import "cosmos:plugin/table@0.1.0" "[method]rows.read" (func $read (param i32 i64 i32 i32 i32 i32)))
  (import "cosmos:plugin/table@0.1.0" "[resource-drop]rows" (func $drop_rows (param i32)))
  (memory (export "memory") 8)
  (global $heap (mut i32) (i32.const 4096))
  (global $rows (mut i32) (i32.const 0))

  ;; name `rows`, version `1.0`, no summary, one dataset `d` for training, no rewards, no schema, wants `table`.
  (data (i32.const 16) "rows1.0dtabledata")
  (data (i32.const 1024)
    "\10\00\00\00\04\00\00\00" "\14\00\00\00\03\00\00\00" "\00\00\00\00\00\00\00\00"
    "\00\05\00\00\01\00\00\00" "\00\00\00\00\00\00\00\00" "\00\00\00\00\00\00\00\00" "\10\05\00\00\01\00\00\00")
  (data (i32.const 1280) "\17\00\00\00\01\00\00\00\00\00\00\00")
  (data (i32.const 1296) "\18\00\00\00\05\00\00\00")

  (func $alloc (param $bytes i32) (result i32)
    (local $at i32)
    (local.set $at (global.get $heap))
    (global.set $heap (i32.and (i32.add (i32.add (local.get $at) (local.get $bytes)) (i32.const 15)) (i32.const -16)))
    (local.get $at))
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (call $alloc (local.get 3)))
  (func (export "cosmos:plugin/metadata@0.1.0#describe") (result i32) (i32.const 1024))

  (func (export "cosmos:plugin/dataset@0.1.0#init") (param i32 i32 i32 i32) (result i32)
    (call $open (i32.const 29) (i32.const 4) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 2048))
    ;; `result<rows, string>` and `result<_, string>` have the same layout when they fail.
    (if (i32.eqz (i32.load8_u (i32.const 2048))) (then (global.set $rows (i32.load offset=4 (i32.const 2048)))))
    (i32.const 2048))

  (func (export "cosmos:plugin/dataset@0.1.0#len") (result i32)
    (i32.store8 (i32.const 2104) (i32.const 0))
    (i64.store (i32.const 2112) (call $len (global.get $rows)))
    (i32.const 2104))

  (func (export "cosmos:plugin/dataset@0.1.0#get-batch") (param $indices i32) (param $count i32) (result i32)
    (local $list i32) (local $item i32) (local $at i32)
    (local.set $list (call $alloc (i32.const 8)))
    (i32.store (local.get $list) (call $alloc (i32.mul (local.get $count) (i32.const 48))))
    (i32.store offset=4 (local.get $list) (local.get $count))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
        (local.set $at (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 48))))
        (if (i64.eq (i64.load (i32.add (local.get $indices) (i32.mul (local.get $item) (i32.const 8)))) (i64.const 13))
          (then (loop $forever
            (call $read (global.get $rows) (i64.const 13) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 2200))
            (global.set $heap (i32.const 65536))
            (br $forever))))
        (if (i64.eq (i64.load (i32.add (local.get $indices) (i32.mul (local.get $item) (i32.const 8)))) (i64.const 14))
          (then (loop $forever
            (call $open (i32.const 29) (i32.const 4) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
              (i32.const 0) (i32.const 2200))
            (br $forever))))
        (memory.fill (local.get $at) (i32.const 0) (i32.const 48))
        (call $read (global.get $rows)
          (i64.load (i32.add (local.get $indices) (i32.mul (local.get $item) (i32.const 8))))
          (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 2200))
        (if (i32.load8_u (i32.const 2200))
          (then
            (i32.store8 (local.get $at) (i32.const 1))
            (i64.store offset=4 (local.get $at) (i64.load offset=4 (i32.const 2200))))
          (else
            (i64.store offset=8 (local.get $at) (i64.load (i32.load offset=4 (i32.const 2200))))
            (i32.store8 offset=16 (local.get $at) (i32.const 1))
            (i64.store offset=20 (local.get $at) (i64.load (i32.load offset=4 (i32.const 2200))))))
        (local.set $item (i32.add (local.get $item) (i32.const 1)))
        (br $next)))
    (local.get $list))
  (func (export "cabi_post_cosmos:plugin/dataset@0.1.0#get-batch") (param i32)
    (global.set $heap (i32.const 4096))))
