;; What a completion gets depends on the bytes of its prompt, so that a run meets everything: their sum modulo 8 is
;; 0: a panic, 1: an endless loop, 2: NaN, 3: a sample error, 4: all the memory there is; the rest score the length.
(func $init (param i32 i32 i32 i32) (result i32) (call $init_ok))
(data (i32.const 2048) "not today")
(func $sum (param $at i32) (param $bytes i32) (result i32)
  (local $sum i32)
  (block $done
    (loop $next
      (br_if $done (i32.eqz (local.get $bytes)))
      (local.set $sum (i32.add (local.get $sum) (i32.load8_u (local.get $at))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (local.set $bytes (i32.sub (local.get $bytes) (i32.const 1)))
      (br $next)))
  (i32.and (local.get $sum) (i32.const 7)))
(func $score (param $samples i32) (param $count i32) (result i32)
  (local $list i32) (local $item i32) (local $sample i32) (local $what i32)
  (local.set $list (call $lengths (local.get $samples) (local.get $count)))
  (block $done
    (loop $next
      (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
      (local.set $sample (i32.add (local.get $samples) (i32.mul (local.get $item) (i32.const 32))))
      (local.set $what (call $sum (i32.load (local.get $sample)) (i32.load offset=4 (local.get $sample))))
      (if (i32.eqz (local.get $what)) (then unreachable))
      (if (i32.eq (local.get $what) (i32.const 1)) (then (loop $forever (br $forever))))
      (if (i32.eq (local.get $what) (i32.const 2))
        (then (call $set (local.get $list) (local.get $item) (f64.const nan))))
      (if (i32.eq (local.get $what) (i32.const 3))
        (then (call $fail (local.get $list) (local.get $item) (i32.const 2048) (i32.const 9))))
      (if (i32.eq (local.get $what) (i32.const 4)) (then
        (loop $more (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))
        unreachable))
      (local.set $item (i32.add (local.get $item) (i32.const 1)))
      (br $next)))
  (local.get $list))
