;; Scores how often this instance was called: shows when an instance is kept and when it is replaced.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(global $calls (mut i32) (i32.const 0))
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $list i32) (local $item i32)
  (global.set $calls (i32.add (global.get $calls) (i32.const 1)))
  (local.set $list (call $lengths (local.get $samples) (local.get $count)))
  (block $done
    (loop $next
      (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
      (call $set (local.get $list) (local.get $item) (f64.convert_i32_u (global.get $calls)))
      (local.set $item (i32.add (local.get $item) (i32.const 1)))
      (br $next)))
  (local.get $list))
