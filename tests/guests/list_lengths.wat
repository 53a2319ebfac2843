;; How many results it returns, by the start of a completion: `-` one too few, `+` one too many, `0` none,
;; `k` a thousand, `g` four billion.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(func $has (param $samples i32) (param $count i32) (param $byte i32) (result i32)
  (i32.ge_s (call $find (local.get $samples) (local.get $count) (local.get $byte)) (i32.const 0)))
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $list i32)
  (local.set $list (call $lengths (local.get $samples) (local.get $count)))
  (if (call $has (local.get $samples) (local.get $count) (i32.const 45)) (then
    (i32.store offset=4 (local.get $list) (i32.sub (local.get $count) (i32.const 1)))))
  (if (call $has (local.get $samples) (local.get $count) (i32.const 43)) (then
    (i32.store offset=4 (local.get $list) (i32.add (local.get $count) (i32.const 1)))
    (call $set (local.get $list) (local.get $count) (f64.const 1))))
  (if (call $has (local.get $samples) (local.get $count) (i32.const 48)) (then
    (i32.store offset=4 (local.get $list) (i32.const 0))))
  (if (call $has (local.get $samples) (local.get $count) (i32.const 107)) (then
    (i32.store (local.get $list) (i32.const 65536))
    (memory.fill (i32.const 65536) (i32.const 0) (i32.const 24000))
    (i32.store offset=4 (local.get $list) (i32.const 1000))))
  (if (call $has (local.get $samples) (local.get $count) (i32.const 103)) (then
    (i32.store offset=4 (local.get $list) (i32.const 0xffffffff))))
  (local.get $list))
