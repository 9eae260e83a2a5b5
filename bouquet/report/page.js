// The slider over the rounds: show one round's pictures, and say which.
for (const slider of document.querySelectorAll("input[data-rounds]")) {
  const rounds = JSON.parse(slider.dataset.rounds), losses = JSON.parse(slider.dataset.losses);
  const show = () => {
    const round = rounds[slider.value];
    for (const picture of document.querySelectorAll("img[data-round]")) picture.hidden = picture.dataset.round !== String(round);
    const loss = losses[round] === undefined ? "" : ", validation loss " + losses[round].toFixed(4);
    const words = (round === 0 ? "base model" : "round " + round) + loss;
    document.getElementById("shown").textContent = words;
    for (const caption of document.querySelectorAll("[data-caption]")) caption.textContent = round === 0 ? "base" : "round " + round;
    slider.setAttribute("aria-valuetext", words);
  };
  slider.addEventListener("input", show);
  show();
}
