;; A conversation without a toolchain: an environment that opens with the example's messages and answers `1+1` to
;; messages of an even number of bytes and `2*3` to the others, three times. The reward of a step is a tenth of the bytes
;; of the message; one that begins with `8` makes the step fail.
(module
(memory (export "memory") 2)
(global $heap (mut i32) (i32.const 4096))

;; The description: name, version, summary, no datasets, no rewards, one environment `sums`, no schema, wants nothing.
(data (i32.const 16) "talker1.0answers with sumssumstool1+12*3bytesturnsit said eight")
(data (i32.const 1024)
  "\10\00\00\00\06\00\00\00" "\16\00\00\00\03\00\00\00" "\19\00\00\00\11\00\00\00"
  "\00\00\00\00\00\00\00\00" "\00\00\00\00\00\00\00\00" "\00\05\00\00\01\00\00\00" "\00\00\00\00\00\00\00\00" "\00\00\00\00\00\00\00\00")
(data (i32.const 1280) "\2a\00\00\00\04\00\00\00")

(func $alloc (param $bytes i32) (result i32)
  (local $at i32)
  (local.set $at (global.get $heap))
  (global.set $heap (i32.and (i32.add (i32.add (local.get $at) (local.get $bytes)) (i32.const 15)) (i32.const -16)))
  (block $fits
    (loop $more
      (br_if $fits (i32.le_u (global.get $heap) (i32.shl (memory.size) (i32.const 16))))
      (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))
      (br $more)))
  (local.get $at))

(func (export "cabi_realloc") (param $old i32) (param $old_bytes i32) (param $align i32) (param $bytes i32) (result i32)
  (local $new i32)
  (local.set $new (call $alloc (local.get $bytes)))
  (memory.copy (local.get $new) (local.get $old) (local.get $old_bytes))
  (local.get $new))

(func (export "cosmos:plugin/metadata@0.2.0#describe") (result i32) (i32.const 1024))
(func (export "cosmos:plugin/environment@0.2.0#init") (param i32 i32 i32 i32) (result i32)
  (local $at i32)
  (local.set $at (call $alloc (i32.const 12)))
  (i32.store8 (local.get $at) (i32.const 0))
  (local.get $at))

;; An empty list of `$count` entries of `$bytes` each.
(func $list (param $count i32) (param $bytes i32) (result i32)
  (local $list i32)
  (local.set $list (call $alloc (i32.const 8)))
  (i32.store (local.get $list) (call $alloc (i32.mul (local.get $count) (local.get $bytes))))
  (i32.store offset=4 (local.get $list) (local.get $count))
  (memory.fill (i32.load (local.get $list)) (i32.const 0) (i32.mul (local.get $count) (local.get $bytes)))
  (local.get $list))

;; A state of one byte, at `$at` as pointer and length.
(func $state (param $at i32) (param $value i32)
  (local $byte i32)
  (local.set $byte (call $alloc (i32.const 1)))
  (i32.store8 (local.get $byte) (local.get $value))
  (i32.store (local.get $at) (local.get $byte))
  (i32.store offset=4 (local.get $at) (i32.const 1)))

;; Starts are 24 bytes with their messages first; results are 28: tag, messages, tools, state.
(func (export "cosmos:plugin/environment@0.2.0#reset-batch") (param $starts i32) (param $count i32) (result i32)
  (local $list i32) (local $item i32) (local $out i32) (local $start i32)
  (local.set $list (call $list (local.get $count) (i32.const 28)))
  (block $done
    (loop $next
      (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
      (local.set $start (i32.add (local.get $starts) (i32.mul (local.get $item) (i32.const 24))))
      (local.set $out (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 28))))
      (i32.store offset=4 (local.get $out) (i32.load (local.get $start)))
      (i32.store offset=8 (local.get $out) (i32.load offset=4 (local.get $start)))
      (call $state (i32.add (local.get $out) (i32.const 20)) (i32.const 0))
      (local.set $item (i32.add (local.get $item) (i32.const 1)))
      (br $next)))
  (local.get $list))

;; Actions are 24 bytes: state, completion, turn, complete. Results are 48: tag, then at 8 messages, state, done (24),
;; reward (32), metrics (40).
(func (export "cosmos:plugin/environment@0.2.0#step-batch") (param $actions i32) (param $count i32) (result i32)
  (local $list i32) (local $item i32)
  (local.set $list (call $list (local.get $count) (i32.const 48)))
  (block $done
    (loop $next
      (br_if $done (i32.ge_u (local.get $item) (local.get $count)))
      (call $answer
        (i32.add (local.get $actions) (i32.mul (local.get $item) (i32.const 24)))
        (i32.add (i32.load (local.get $list)) (i32.mul (local.get $item) (i32.const 48))))
      (local.set $item (i32.add (local.get $item) (i32.const 1)))
      (br $next)))
  (local.get $list))

(func $answer (param $action i32) (param $out i32)
  (local $bytes i32) (local $turn i32) (local $message i32) (local $metrics i32)
  (local.set $bytes (i32.load offset=12 (local.get $action)))
  ;; The turn is what the state remembers.
  (local.set $turn (i32.load8_u (i32.load (local.get $action))))
  (if (i32.ne (local.get $turn) (i32.load offset=16 (local.get $action))) (then unreachable))
  (if (local.get $bytes)
    (then (if (i32.eq (i32.load8_u (i32.load offset=8 (local.get $action))) (i32.const 56))
      (then
        (i32.store8 (local.get $out) (i32.const 1))
        (i32.store offset=8 (local.get $out) (i32.const 66))
        (i32.store offset=12 (local.get $out) (i32.const 13))
        (return)))))
  (local.set $message (call $alloc (i32.const 16)))
  (i32.store (local.get $message) (i32.const 46))
  (i32.store offset=4 (local.get $message) (i32.const 4))
  (i32.store offset=8 (local.get $message)
    (select (i32.const 53) (i32.const 50) (i32.and (local.get $bytes) (i32.const 1))))
  (i32.store offset=12 (local.get $message) (i32.const 3))
  (i32.store offset=8 (local.get $out) (local.get $message))
  (i32.store offset=12 (local.get $out) (i32.const 1))
  (call $state (i32.add (local.get $out) (i32.const 16)) (i32.add (local.get $turn) (i32.const 1)))
  (i32.store8 offset=24 (local.get $out) (i32.ge_u (local.get $turn) (i32.const 2)))
  (f64.store offset=32 (local.get $out) (f64.div (f64.convert_i32_u (local.get $bytes)) (f64.const 10)))
  (local.set $metrics (call $alloc (i32.const 32)))
  (i32.store (local.get $metrics) (i32.const 56))
  (i32.store offset=4 (local.get $metrics) (i32.const 5))
  (f64.store offset=8 (local.get $metrics) (f64.convert_i32_u (local.get $bytes)))
  (i32.store offset=16 (local.get $metrics) (i32.const 61))
  (i32.store offset=20 (local.get $metrics) (i32.const 5))
  (f64.store offset=24 (local.get $metrics) (f64.const 1))
  (i32.store offset=40 (local.get $out) (local.get $metrics))
  (i32.store offset=44 (local.get $out) (i32.const 2)))

;; The host has read the result: everything can go.
(func (export "cabi_post_cosmos:plugin/environment@0.2.0#reset-batch") (param i32) (global.set $heap (i32.const 4096)))
(func (export "cabi_post_cosmos:plugin/environment@0.2.0#step-batch") (param i32) (global.set $heap (i32.const 4096)))
)
