import { make } from "./elements.js";

// Returns a picture file as URL-safe base64 of a JPEG. It is shrunk to the size of the image tower's input, so that it
// uploads quickly and fits into the URL of the page.
export async function shrink(file, size) {
  const bitmap = await createImageBitmap(file);
  const shorter = Math.min(bitmap.width, bitmap.height), longer = Math.max(bitmap.width, bitmap.height);
  const scale = Math.min(1, size / shorter, (3 * size) / longer);
  const canvas = make("canvas", {
    width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)),
  });
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const encoded = canvas.toDataURL("image/jpeg", 0.85).split(",")[1];
  return encoded.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export const dataUri = (picture) => `data:image/jpeg;base64,${picture.replaceAll("-", "+").replaceAll("_", "/")}`;

export function bytes(picture) {
  const text = atob(picture.replaceAll("-", "+").replaceAll("_", "/"));
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}
