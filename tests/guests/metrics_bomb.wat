;; One result with three million metrics, all without a name: 48 MB in the guest, more in a host that takes them all.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $list i32) (local $item i32) (local $at i32)
  (local.set $item (call $guilty (local.get $samples) (local.get $count)))
  (local.set $list (call $lengths (local.get $samples) (local.get $count)))
  (if (i32.ge_s (local.get $item) (i32.const 0)) (then
    (local.set $at (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 24))))
    (i32.store offset=16 (local.get $at) (call $alloc (i32.const 48000000)))
    (i32.store offset=20 (local.get $at) (i32.const 3000000))))
  (local.get $list))
