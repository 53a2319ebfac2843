/** Datasets, rewards and environments for cosmos-host. `cosmos-host plugin build` makes a component of them. */

export type DatasetRole = "train" | "validation";
export type RewardRole = "train" | "validation" | "filter";
export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };

/** One turn of a conversation. */
export interface Message {
  role: string;
  content: string;
}

/** A setting of the plugin, as JSON schema has it. Every one has a default, since a run may leave any out. */
export type SettingSchema = { description?: string } & (
  | { type: "boolean"; default: boolean }
  | { type: "integer" | "number"; default: number; minimum?: number; maximum?: number }
  | { type: "string"; default: string }
  | { type: "array"; items: { type: "boolean" | "integer" | "number" | "string" }; default: readonly (boolean | number | string)[] }
  | { enum: readonly (string | number)[]; default: string | number }
);

type Plain<T> = T extends "boolean" ? boolean : T extends "integer" | "number" ? number : T extends "string" ? string : unknown;
type SettingOf<S> = S extends { enum: readonly (infer E)[] }
  ? E
  : S extends { type: "array"; items: { type: infer T } }
    ? readonly Plain<T>[]
    : S extends { type: infer T }
      ? Plain<T>
      : unknown;

/** The values of the settings that a definition names. */
export type SettingsOf<P> = { readonly [K in keyof P]: SettingOf<P[K]> };

/** A dataset section of the run: for a validation dataset or reward, the validation section's. */
export interface DatasetSettings {
  /** Hub id or local path. */
  readonly name: string;
  readonly subset: string;
  readonly revision: string;
  readonly splits: readonly string[];
  /** How many of the first rows to use, a count or a fraction. */
  readonly testSize: number | null;
  /** How many of `rows` rows `testSize` leaves. */
  limit(rows: number): number;
}

/** What the run says beside the plugin's own settings. */
export interface Run {
  readonly dataset: DatasetSettings;
  /** The run's whole `[custom]` section, one table per plugin. */
  readonly custom: { readonly [key: string]: Json };
}

/** What the student is asked, and what its answer is judged by. */
export interface Example {
  /** Finished text, or messages that the host renders with the student's chat template. */
  prompt: string | readonly Message[];
  /** Any JSON value; the reward gets it back as `sample.reference`. */
  reference?: unknown;
  /** The completion to imitate, for supervised fine-tuning. */
  response?: string;
  metadata?: { [key: string]: string };
}

/** A completion to score. */
export interface Sample {
  readonly prompt: string;
  readonly completion: string;
  /** The example's reference; `null` when it has none. Its shape is what the dataset made of it. */
  readonly reference: any;
  readonly metadata: { readonly [key: string]: string };
}

/** A number, and named numbers beside it whose means the run logs as `reward/<plugin>/<name>`. */
export interface Score {
  value: number;
  metrics?: { [name: string]: number };
}

export type Scorer = (sample: Sample) => number | Score;

export type Reward<S> =
  | { role?: RewardRole; score(sample: Sample, settings: S, run: Run): number | Score; open?: undefined }
  /** Sets something up once, for example a regular expression, and gives the function that scores. */
  | { role?: RewardRole; open(settings: S, run: Run): Scorer; score?: undefined };

/** A sequence of examples; an array of them is one too. */
export interface Dataset {
  readonly length: number;
  get(index: number): Example;
}

/** What a conversation starts from: one example of the dataset. */
export interface Start {
  readonly messages: readonly Message[];
  readonly reference: any;
  readonly metadata: { readonly [key: string]: string };
}

/** The conversation that the model first sees. */
export interface Opened {
  messages: readonly Message[];
  /** Tool definitions for the chat template's `tools`. */
  tools?: readonly object[];
  /** Any JSON value of at most 65,536 bytes; comes back with the next step. Nothing else is remembered. */
  state?: unknown;
}

/** What the model said. */
export interface Action {
  readonly completion: string;
  /** How many messages the model has said before this one. */
  readonly turn: number;
  /** Whether the model ended its message itself; otherwise a limit cut it off and no further turn follows. */
  readonly complete: boolean;
  readonly state: any;
}

/** What the model hears next. */
export interface Outcome {
  /** Not empty, unless `done`. */
  messages?: readonly Message[];
  done?: boolean;
  /** Added to the conversation's reward. */
  reward?: number;
  metrics?: { [name: string]: number };
  state?: unknown;
}

export interface Environment {
  reset(start: Start): Opened;
  step(action: Action): Outcome;
}

export interface Definition<P> {
  /** Letters, digits, `-` and `_`. */
  name: string;
  version: string;
  summary?: string;
  /** What a run may set in `[custom.<name>]`. */
  settings?: P;
  /** Folders the plugin would like to read, as grants: `dir:/data:ro`. The imports of `plugin.toml` come by themselves. */
  wants?: readonly string[];
  datasets?: { [name: string]: { role?: DatasetRole; open(settings: SettingsOf<P>, run: Run): Dataset | readonly Example[] } };
  rewards?: { [name: string]: Reward<SettingsOf<P>> };
  environments?: { [name: string]: { open(settings: SettingsOf<P>, run: Run): Environment } };
}

/** What `definePlugin` gives back: the module's default export. */
export interface Plugin {
  readonly name: string;
}

/** Declares the plugin: `export default definePlugin({…})`. Throws when something is wrong with the definition. */
export function definePlugin<const P extends { readonly [name: string]: SettingSchema } = {}>(definition: Definition<P>): Plugin;

/** This sample cannot be scored, or this example cannot be given. A wrong answer is not an error: score it low. */
export class SampleError extends Error {}

export function system(content: string): Message;
export function user(content: string): Message;
export function assistant(content: string): Message;

/** Log lines. Needs `log` among the `imports` of `plugin.toml`. `console.log` goes here too, and nowhere without it. */
export const log: {
  trace(message: string): void;
  debug(message: string): void;
  info(message: string): void;
  warn(message: string): void;
  error(message: string): void;
};

/** An open table: rows are objects of their columns. */
export interface Rows extends Iterable<{ [column: string]: any }> {
  readonly length: number;
  readonly columns: readonly string[];
  get(index: number): { [column: string]: any };
  /** At most 64 rows from `start`. */
  read(start: number, count: number): { [column: string]: any }[];
}

/** Rows of Hugging Face datasets, read by the host. Needs `table` among the `imports` of `plugin.toml`. */
export const table: {
  /** A hub dataset, a folder or a file: by name, or as the run's dataset section says (`run.dataset`). */
  open(
    source: string | DatasetSettings,
    options?: { subset?: string; revision?: string; splits?: readonly string[]; columns?: readonly string[] },
  ): Rows;
};

/** The student's own chat template. Needs `chat-template` among the `imports` of `plugin.toml`. */
export const chatTemplate: {
  /** `options` are template variables, for example `{ enable_thinking: true }`. */
  render(messages: readonly Message[], addGenerationPrompt?: boolean, options?: { [name: string]: unknown }): string;
};
