// The run's settings: its dataset section, and the plugin's own table of `[custom]` checked against its schema.

const DIALECT = "https://json-schema.org/draft/2020-12/schema";

export function schemaText(name, settings) {
  if (settings === undefined) return "";
  const own = { type: "object", additionalProperties: false, properties: settings };
  return JSON.stringify({
    $schema: DIALECT,
    type: "object",
    properties: { custom: { type: "object", properties: { [name]: own } } },
  });
}

export function parseSettings(name, schema, text) {
  const given = text.trim() ? parsed(text) : {};
  const custom = table(given.custom, "`custom`");
  return {
    own: read(schema ?? {}, table(custom[name], `\`custom.${name}\``), `custom.${name}`),
    run: { dataset: datasetSection(table(given.dataset, "`dataset`")), custom },
  };
}

function parsed(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`the settings are not JSON: ${error.message}`);
  }
  return table(value, "the settings");
}

function table(value, place) {
  if (value === undefined || value === null) return {};
  if (typeof value !== "object" || Array.isArray(value)) throw new Error(`${place} is not a table`);
  return value;
}

function datasetSection(raw) {
  const text = (key) => {
    if (raw[key] !== undefined && raw[key] !== null && typeof raw[key] !== "string") {
      throw new Error(`\`dataset.${key}\` is not a text`);
    }
    return raw[key] ?? "";
  };
  const split = raw.split ?? [];
  const testSize = raw.test_size ?? null;
  return {
    name: text("name"),
    subset: text("subset"),
    revision: text("revision"),
    splits: (Array.isArray(split) ? split : [split]).filter((one) => one !== ""),
    testSize,
    limit(rows) {
      if (testSize === null) return rows;
      // JSON has one kind of number; 1.0 means all and 1 one row, so a whole number is a count.
      if (Number.isInteger(testSize)) return Math.min(rows, Math.max(testSize, 0));
      if (testSize > 0 && testSize < 1) return Math.floor(rows * testSize);
      throw new Error(`\`dataset.test_size\` is ${testSize}: give a number of rows, or a fraction between 0 and 1`);
    },
  };
}

function read(schema, given, place) {
  for (const key of Object.keys(given)) {
    if (!Object.hasOwn(schema, key)) {
      const known = Object.keys(schema).map((name) => `\`${name}\``).join(", ") || "none";
      throw new Error(`\`${place}\` has no setting \`${key}\`: it has ${known}`);
    }
  }
  const values = {};
  for (const [key, one] of Object.entries(schema)) {
    const value = Object.hasOwn(given, key) ? given[key] : one.default;
    check(one, value, `${place}.${key}`);
    values[key] = value;
  }
  return Object.freeze(values);
}

const SAID = { boolean: "true or false", integer: "a whole number", number: "a number", string: "a text", array: "a list" };

export function check(schema, value, place) {
  const shown = JSON.stringify(value);
  if (schema.enum) {
    if (!schema.enum.includes(value)) {
      throw new Error(`\`${place}\` is ${shown}: choose ${schema.enum.map((one) => JSON.stringify(one)).join(" or ")}`);
    }
    return;
  }
  if (!isA(schema.type, value)) throw new Error(`\`${place}\` is ${shown}, not ${SAID[schema.type]}`);
  if (schema.minimum !== undefined && value < schema.minimum) throw new Error(`\`${place}\` is ${shown}, below ${schema.minimum}`);
  if (schema.maximum !== undefined && value > schema.maximum) throw new Error(`\`${place}\` is ${shown}, above ${schema.maximum}`);
  if (schema.type === "array") value.forEach((one, index) => check(schema.items, one, `${place}[${index}]`));
}

function isA(type, value) {
  switch (type) {
    case "boolean":
    case "string":
      return typeof value === type;
    case "number":
      return typeof value === "number";
    case "integer":
      return Number.isSafeInteger(value);
    case "array":
      return Array.isArray(value);
    default:
      throw new Error(`a setting has the type boolean, integer, number, string or array, or an \`enum\`, not ${type}`);
  }
}
